def prune_checkpoints(*a,**k): return {}
