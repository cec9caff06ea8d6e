"""Each kind of what people bring or do by mistake, with inputs of its own."""
