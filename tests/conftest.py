"""Before anything is imported: tests ask no hub for anything, so they say the same with and without a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # ranks share the cores; more threads only fight
