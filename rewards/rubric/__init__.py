"""Rubrics as rewards (arXiv 2507.17746): criteria that a judge scores a response by, where no verifier exists."""
