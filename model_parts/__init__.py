"""What `model_config`, `model_components` and `model_builder` are made of: the registry, the presets, attention and losses."""
