"""From one adapter format to another, without the model: a table of converters (`converters`), one file each."""
