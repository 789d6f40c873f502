"""oneDNN products and memory settings for CPUs; no effect on other devices."""
