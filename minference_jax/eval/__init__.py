"""Quality: tasks, a batched runner, the methods to compare, and reports."""
