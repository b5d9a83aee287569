# To read transformers itself took pyright a quarter of its time.
from typing import Any

def __getattr__(name: str) -> Any: ...
