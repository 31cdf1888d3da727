"""From scored samples to training records: Best-of-N, top-k, thresholds, RAFT, statistical rejection, pairs. No torch."""
