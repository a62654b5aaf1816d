"""Configuration: the schema and its YAML decoder."""
