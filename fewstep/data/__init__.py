"""What students learn from: prompts, and what the teacher made of them, in shards on disk."""
