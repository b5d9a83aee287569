"""Quality: tasks, a batched runner, the methods to compare, and reports.

```python
model, tokenizer = Llama.from_pretrained(path), load_tokenizer(path)
methods = [Method(name, METHODS[name]) for name in ("dense", "minference", "a-shape")]
results = evaluate(model, tokenizer, make_tasks(["niah", "ppl"]), lengths=[4096], methods=methods, path="out.jsonl")
write_report(results, "out")
```
"""

from minference_jax.eval.methods import METHODS as METHODS
from minference_jax.eval.methods import Method as Method
from minference_jax.eval.report import markdown as markdown
from minference_jax.eval.report import write_report as write_report
from minference_jax.eval.results import Result as Result
from minference_jax.eval.results import perplexity_cell as perplexity_cell
from minference_jax.eval.results import score_cell as score_cell
from minference_jax.eval.runner import evaluate as evaluate
from minference_jax.eval.samples import Sample as Sample
from minference_jax.eval.samples import Task as Task
from minference_jax.eval.tasks import make_tasks as make_tasks
