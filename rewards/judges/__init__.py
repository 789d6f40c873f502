"""Judges: language models that grade a response, behind an endpoint or as the policy itself."""
