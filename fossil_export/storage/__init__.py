"""Where models and adapters come from: what the user typed becomes files, here or elsewhere."""
