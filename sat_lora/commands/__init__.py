"""One module per `sat-lora` command, each with the function `add(commands)`."""
