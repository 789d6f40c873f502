"""Shared by the recipes around their loop: build, checks, checkpoints, self-test. Imported by recipes only."""
