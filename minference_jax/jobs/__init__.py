"""Jobs over a user's own rows: one reply for each, resumable.

```python
from minference_jax.jobs import PromptTemplate, batch_replies, read_rows

rows = read_rows("reviews.csv")
template = PromptTemplate("Is this review positive or negative? {text}")
replies = batch_replies(model, tokenizer, rows, template, choices=("positive", "negative"), out="replies.jsonl")
```
"""

from minference_jax.jobs.batch import batch_replies as batch_replies
from minference_jax.jobs.batch_runner import Reply as Reply
from minference_jax.jobs.prompt_template import PromptTemplate as PromptTemplate
from minference_jax.jobs.rows import read_rows as read_rows
from minference_jax.jobs.summarize import summarize as summarize
