"""What several rooms read from outside: YAML text, names of the model hub, and the packaged SmolLM2."""
