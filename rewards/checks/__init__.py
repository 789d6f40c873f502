"""Checks of rewards, rubrics and judges before (and while) they are trained on."""
