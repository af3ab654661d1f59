"""Request and response schemas of the OpenAI API, shared by the API server and the workers."""
