"""From YAML files and overrides to a configuration that is checked, and the same on every rank."""
