"""Is the artifact what was trained? Weight by weight and answer by answer."""
