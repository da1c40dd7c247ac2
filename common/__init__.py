"""What you throw away when you copy a script: corpus, model presets, rank printing, run log, plots."""
