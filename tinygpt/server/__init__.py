"""A model over HTTP, as OpenAI's clients ask for texts, and a page to read them on."""
