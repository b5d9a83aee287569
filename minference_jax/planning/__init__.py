"""What a run will cost before it runs: time of attention, memory, prompt-length buckets."""
