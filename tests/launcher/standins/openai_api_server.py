from fastserve.config import ApiServerConfig

from .service import run

run("openai_api_server", ApiServerConfig)
