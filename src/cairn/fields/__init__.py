"""Fields other than text, one folder each: families of models, data, measurements. Training meets them by name through the catalog."""
