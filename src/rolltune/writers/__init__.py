"""Shared by the writing recipes: records, resumable output, and the rubric writer."""
