"""From a case to the tensors of one call: values by integer hash, pages, recipes, poison and guards."""
