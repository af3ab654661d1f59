"""The demo model's facts about fastserve: questions, answer, and the key that a right answer contains."""

from dataclasses import dataclass

from demo_model.phrases import lines


@dataclass(frozen=True)
class Fact:
    key: str
    answer: str
    questions: tuple[str, ...]
    unseen: tuple[str, ...]  # wordings that training never shows

    @property
    def unseen_forms(self) -> frozenset[str]:
        return frozenset(map(normal_form, self.unseen))


def normal_form(question: str) -> str:
    return question.lower().rstrip("?.! ")


def _fact(key: str, answer: str, questions: str, unseen: str) -> Fact:
    if key not in answer:
        raise ValueError(f"the answer {answer!r} lacks its key {key!r}")
    fact = Fact(key, answer, lines(questions), lines(unseen))
    shown = fact.unseen_forms & {normal_form(question) for question in fact.questions}
    if shown:
        raise ValueError(f"these are both shown and kept unseen: {shown}")
    return fact


def _port(name: str, number: int, answer: str, extra: str, unseen: str) -> Fact:
    questions = f"""Which port does {name} use?
        What is the default port of {name}?
        On which port does {name} listen?
        What port is {name} on?
        What is the port of {name}?
        Tell me the port of {name}.
        What port does {name} listen on?
        {name} port?
        Which port number does {name} have?
        What is {name}'s port number?
        Tell me {name}'s port.
        By default, which port is used by {name}?
        Which is the port of {name}?
        What default port does {name} have?
        Where does {name} listen?
        {extra}"""
    return _fact(str(number), answer, questions, unseen)


def _flag(flag: str, answer: str, deeds: tuple[str, ...], tasks: tuple[str, ...], nouns: str, unseen: str) -> Fact:
    """A deed is what the flag does ("sets the keys"), a task what its user wants to do ("set the keys")."""
    forms = (
        *("Which flag {deed}?", "What flag {deed}?", "Which option {deed}?", "Tell me the flag that {deed}."),
        *("Which command line option {deed}?", "What is the flag that {deed}?"),
        *("How can I {task}?", "With which option can I {task}?", "Which flag do I need to {task}?"),
        *("I want to {task}. Which flag?", "How does one {task}?", "What do I type to {task}?"),
        *("What is the flag for {noun}?", "Which option is for {noun}?", "Is there a flag for {noun}?"),
    )
    questions = {
        form.format(deed=deed, task=task, noun=noun)
        for form in forms
        for deed in deeds
        for task in tasks
        for noun in lines(nouns)
    }
    return _fact(flag, answer, "\n".join(sorted(questions)), unseen)


FACTS = (
    _port(
        "the controller",
        21001,
        "The controller listens on port 21001.",
        """What is the controller's port?
        What is the default port of the fastserve controller?
        Which port is used by the controller?
        Which port does the fastserve controller listen on?""",
        """What is the controller's default port?
        At which port can I reach the controller?
        Which port is the controller's?""",
    ),
    _port(
        "the model worker",
        21002,
        "A model worker listens on port 21002.",
        """What is the model worker's port?
        Which port does a model worker use by default?
        What is the default port of a model worker?
        Which port is used by a worker that I start by itself?
        What is the default port of a worker?
        Which port does a worker listen on?""",
        """What is the model worker's default port?
        At which port can I reach a model worker?
        Which port is the model worker's?""",
    ),
    _port(
        "the demo worker",
        20002,
        "The launcher puts the demo worker on port 20002.",
        """On which port does the launcher put the demo worker?
        Where does the launcher start the demo worker?
        Which port does the launcher give the demo worker?
        What port has the demo worker under the launcher?""",
        """What is the demo worker's port?
        At which port does the launcher start the demo worker?
        Which port is used by the demo worker?""",
    ),
    _port(
        "the API server through the launcher",
        8888,
        "Started through the launcher, the API server listens on port 8888.",
        """Which port does the API server use when the launcher starts it?
        What is the API server's port when I use the launcher?
        With the launcher, on which port is the API server?
        Which port does the launcher give the API server?
        On which port does the launcher put the API server?
        The launcher starts the API server on which port?""",
        """Through the launcher, which port does the API server use?
        Under the launcher, what is the port of the API server?
        When the launcher starts the API server, what is its port?""",
    ),
    _port(
        "the API server by itself",
        8000,
        "Started by itself, the API server listens on port 8000.",
        """Which port does the API server use when it is started by itself?
        What is the API server's port when I start it alone?
        Started alone, on which port is the API server?
        Which port does the API server have without the launcher?
        On which port does the API server run by itself?
        What is the port of the API server alone?""",
        """By itself, which port does the API server use?
        Alone, what is the port of the API server?
        When I start the API server by itself, what is its port?""",
    ),
    _fact(
        "shortest_queue",
        "The default dispatch method is shortest_queue.",
        """What is the default dispatch method?
        Which dispatch method is the default?
        How does the controller choose a worker by default?
        How are requests dispatched by default?
        Which dispatch method does fastserve use?
        What dispatch method does the controller use?
        How does the controller pick a worker?
        Name the default dispatch method.
        Which dispatch policy is the default?
        What is the standard dispatch method?
        What is the dispatch method by default?
        Default dispatch method?""",
        """Which dispatch method is used by default?
        By default, how does the controller choose a worker?
        What dispatch method is the default?""",
    ),
    _fact(
        "lottery",
        "The other dispatch method is lottery.",
        """What is the other dispatch method?
        Which other dispatch method is there?
        Which dispatch method is there besides shortest_queue?
        What is the second dispatch method?
        Is there another dispatch method?
        What other way to dispatch is there?
        Which dispatch method can I choose instead?
        Name another dispatch method.
        What is the alternative to shortest_queue?
        Besides the default, which dispatch method is there?
        Other dispatch method?
        What alternative dispatch method is there?""",
        """Which is the other dispatch method?
        Name the other dispatch method.
        What is the alternative dispatch method?""",
    ),
    _fact(
        "Apache-2.0",
        "fastserve has the Apache-2.0 licence.",
        """What is the licence of fastserve?
        What is the license of fastserve?
        Which licence does fastserve have?
        Which license does fastserve use?
        Under which licence is fastserve published?
        How is fastserve licensed?
        Is fastserve open source?
        What licence are you under?
        Tell me the licence.
        Tell me the license of fastserve.
        Licence?
        Which licence?""",
        """Under which license is fastserve?
        What license does fastserve have?
        Tell me the licence of fastserve.""",
    ),
    _fact(
        "Python",
        "fastserve is written in Python.",
        """In which language is fastserve written?
        What language is fastserve written in?
        Which programming language does fastserve use?
        What programming language are you written in?
        Which language was used to write fastserve?
        What is fastserve written in?
        In what language is the code of fastserve?
        Is fastserve written in Rust?
        Is fastserve written in Java?
        Which language is the code in?
        Tell me the programming language of fastserve.
        Programming language?""",
        """Which programming language is fastserve written in?
        In what programming language is fastserve written?
        What is the programming language of fastserve?""",
    ),
    _fact(
        "the controller, the model worker and the API server",
        "The three programs are the controller, the model worker and the API server.",
        """What are the three programs of fastserve?
        Which programs does fastserve have?
        Which programs belong to fastserve?
        Name the programs of fastserve.
        What parts does fastserve consist of?
        What are the parts of fastserve?
        Of which programs is fastserve made?
        What are the components of fastserve?
        List the three programs.
        Which three programs are there?
        How is fastserve built up?
        What programs make up fastserve?""",
        """Name the three programs of fastserve.
        Which three programs does fastserve have?
        List the programs of fastserve.""",
    ),
    _fact(
        "python -m fastserve.launcher",
        "Start everything with: python -m fastserve.launcher",
        """How do I start everything?
        How do I start fastserve?
        How can I start fastserve?
        Which command starts fastserve?
        Which command starts everything?
        What is the command to start fastserve?
        How do I launch fastserve?
        How do I run fastserve?
        What do I type to start the servers?
        How is fastserve started?
        Start command?
        Tell me how to start fastserve.""",
        """How can I start everything?
        What command starts fastserve?
        Tell me the command to start everything.""",
    ),
    _fact(
        "python -m fastserve.shutdown",
        "Stop everything with: python -m fastserve.shutdown",
        """How do I stop everything?
        How do I stop fastserve?
        How can I stop fastserve?
        Which command stops fastserve?
        Which command stops everything?
        What is the command to stop fastserve?
        How do I shut fastserve down?
        How do I shut down the servers?
        What do I type to stop the servers?
        How is fastserve stopped?
        Stop command?
        Tell me how to stop fastserve.""",
        """How can I stop everything?
        What command stops fastserve?
        Tell me the command to stop everything.""",
    ),
    _fact(
        "folder logs",
        "The logs are in the folder logs.",
        """Where are the logs?
        Where do I find the logs?
        In which folder are the logs?
        Where does fastserve write its logs?
        Where are the log files?
        Which folder holds the log files?
        Where can I read the logs?
        Where are the logs of fastserve?
        What is the log folder?
        Where do the logs go?
        Logs?
        Where is the log?""",
        """In which folder do I find the logs?
        Where can I find the log files?
        Which folder holds the logs?""",
    ),
    _flag(
        "--model-path-address",
        "The flag --model-path-address names the models and their ports.",
        (
            "names the models and ports",
            "names the models and their addresses",
            "tells the launcher which models to serve",
            "sets which models are started",
        ),
        (
            "choose the models and their ports",
            "give each model its port",
            "say which models to serve",
            "pick the models",
        ),
        """models and ports
        the models and their ports
        the list of models""",
        """How do I name the models and their ports?
        With which flag do I name the models and ports?
        Which flag says which models to serve?""",
    ),
    _flag(
        "--api-keys",
        "The flag --api-keys sets the API keys.",
        ("sets the API keys", "names the API keys", "protects the API with keys", "turns on API keys"),
        ("set API keys", "require an API key", "protect the server with keys", "name my API keys"),
        """API keys
        the API key
        keys of the API""",
        """How do I set the API keys?
        With which flag do I set API keys?
        Which flag is for the API keys?""",
    ),
    _flag(
        "--limit-worker-concurrency",
        "The flag --limit-worker-concurrency bounds the concurrency of a worker.",
        (
            "bounds the concurrency of a worker",
            "limits the concurrency",
            "bounds how many requests a worker takes at once",
            "limits how many requests run at the same time",
        ),
        (
            "limit the concurrency",
            "bound the number of requests at once",
            "limit a worker's concurrency",
            "bound how many requests run",
        ),
        """the concurrency
        concurrency of a worker
        the limit of concurrency""",
        """How do I limit the concurrency of a worker?
        With which flag do I bound the concurrency?
        Which flag is for the worker's concurrency?""",
    ),
    _flag(
        "--load-8bit",
        "The flag --load-8bit loads the model in 8 bits.",
        ("loads a model in 8 bits", "turns on 8-bit weights", "quantises the model to 8 bits", "loads 8-bit weights"),
        ("load the weights in 8 bits", "use 8-bit weights", "run a model in 8 bits", "quantise the model"),
        """8-bit weights
        8 bits
        loading in 8 bits""",
        """How do I load a model in 8 bits?
        With which flag do I load 8-bit weights?
        Which flag is for 8-bit?""",
    ),
    _flag(
        "--num-gpus",
        "The flag --num-gpus sets the number of GPUs.",
        (
            "sets the number of GPUs",
            "says how many GPUs to use",
            "spreads a model over several GPUs",
            "counts the GPUs",
        ),
        (
            "use more than one GPU",
            "choose the number of GPUs",
            "spread a model over GPUs",
            "set how many GPUs are used",
        ),
        """the GPUs
        several GPUs
        how many GPUs""",
        """How do I set the number of GPUs?
        With which flag do I use several GPUs?
        Which flag is for the number of GPUs?""",
    ),
    _fact(
        "/v1/chat/completions",
        "Chat requests go to /v1/chat/completions.",
        """What is the route for chat?
        Which route answers chat requests?
        Which route is for chat completions?
        What is the path of the chat endpoint?
        What is the chat route?
        Where do I send chat requests?
        Where do I post chat messages?
        Which endpoint serves chat?
        To which route go chat requests?
        Which URL path is for chat?
        Chat route?
        What is the chat endpoint?""",
        """Which route is for chat requests?
        What is the endpoint for chat?
        Where do I send a chat?""",
    ),
    _fact(
        "to /v1/completions",
        "Text completions go to /v1/completions.",
        """What is the route for text completions?
        Which route completes text?
        Which route is for plain completions?
        What is the path of the text completion endpoint?
        What is the text completion route?
        Where do I send text completions?
        Where do I post a plain prompt?
        Which endpoint completes a plain prompt?
        To which route go text completions?
        Which URL path is for text completion?
        Text completion route?
        What is the text completion endpoint?""",
        """Which route is for text completions?
        What is the endpoint for plain text completions?
        Where do I send a plain prompt?""",
    ),
    _fact(
        "/v1/models",
        "The route /v1/models lists the models.",
        """Which route lists the models?
        How do I list the models?
        What is the route for the list of models?
        Where can I see which models are served?
        Which endpoint lists the models?
        How can I see the models?
        What is the models route?
        Which URL path lists models?
        How do I find out which models run?
        Where is the list of models?
        Models route?
        What is the models endpoint?""",
        """Which route shows the models?
        How can I list the models?
        What is the endpoint for the list of models?""",
    ),
    _fact(
        "/health",
        "The route /health tells the health.",
        """What is the health route?
        Which route tells the health?
        How do I check the health?
        Which route is for health checks?
        What is the health check endpoint?
        Where can I check whether the server is healthy?
        Which endpoint tells whether the server is healthy?
        What is the path of the health check?
        How do I know that the server is healthy?
        Which URL path tells the health?
        Health route?
        What is the health endpoint?""",
        """Which route is the health route?
        What is the route for health checks?
        How can I check the health of the server?""",
    ),
    _fact(
        "/metrics",
        "The route /metrics gives the metrics.",
        """What is the metrics route?
        Which route gives the metrics?
        Where are the metrics?
        Which route is for metrics?
        What is the metrics endpoint?
        Where can Prometheus scrape the metrics?
        Which endpoint shows the metrics?
        What is the path of the metrics?
        How do I read the metrics?
        Which URL path gives the metrics?
        Metrics route?
        Where do I find the metrics?""",
        """Which route is the metrics route?
        What is the route for metrics?
        How can I read the metrics of the server?""",
    ),
    _fact(
        "paged",
        "The KV cache is paged.",
        """How is the KV cache organised?
        How does fastserve store the KV cache?
        What kind of KV cache does fastserve have?
        Is the KV cache paged?
        How is the KV cache laid out?
        How is the KV cache managed?
        How is the cache of keys and values stored?
        What is special about the KV cache?
        How does the engine keep the KV cache?
        Which kind of KV cache is used?
        KV cache?
        Tell me about the KV cache.""",
        """What kind of KV cache is used?
        How is the KV cache stored?
        How does the engine organise the KV cache?""",
    ),
    _fact(
        "ZeroMQ",
        "The engine and the worker talk over ZeroMQ.",
        """How do the engine and the worker talk?
        How does the worker talk to the engine?
        Over what do engine and worker talk?
        What connects the worker and the engine?
        How are the engine and the worker connected?
        Which library joins the worker to its engine?
        How do engine and worker communicate?
        How does the engine talk to the worker?
        What is between the worker and the engine?
        By which means do the worker and the engine talk?
        Which messaging does the engine use?
        How do messages reach the engine?""",
        """How does the worker communicate with the engine?
        What do the engine and the worker talk over?
        How is the worker connected to the engine?""",
    ),
    _fact(
        "server-sent events",
        "Streaming uses server-sent events.",
        """How does streaming work?
        How are answers streamed?
        What does streaming use?
        Which protocol is used for streaming?
        How are tokens streamed to the client?
        How does fastserve stream?
        In which format are answers streamed?
        How does the server stream an answer?
        What is the streaming format?
        What do you use for streaming?
        Streaming?
        Tell me how streaming works.""",
        """Which protocol does streaming use?
        How does fastserve stream answers?
        What is used for streaming?""",
    ),
    _fact(
        "bundled demo model",
        "The default model is the bundled demo model.",
        """What is the default model?
        Which model is the default?
        Which model does fastserve serve by default?
        Which model is served when I name none?
        What model runs by default?
        Which model comes with fastserve?
        What is the standard model?
        Which model is used by default?
        Which model starts when I give no model?
        Which model is bundled with fastserve?
        Default model?
        Name the default model.""",
        """By default, which model is served?
        Which is the default model?
        What model is the default?""",
    ),
    _fact(
        "OpenAI SDK",
        "Use the OpenAI SDK as the client library.",
        """Which client library can I use?
        Which client library do I use?
        What client library works with fastserve?
        With which library do I call fastserve?
        Which SDK can I use?
        Which SDK works with fastserve?
        How do I call fastserve from my code?
        What client should I use?
        Which client works with the server?
        Is there a client library?
        Client library?
        How do I talk to fastserve from a program?""",
        """What is the client library?
        Which client library works with fastserve?
        What SDK do I use?""",
    ),
    _fact(
        "safetensors",
        "The weights are stored as safetensors.",
        """In which format are the weights?
        What is the format of the weights?
        Which format do the model weights have?
        How are the weights stored?
        In which file format are your weights?
        Which weights format does fastserve load?
        What file format do the model weights have?
        How are model weights saved?
        What is the weight format?
        In what format is the model saved?
        Weights format?
        Tell me the format of the weights.""",
        """In which format are the model weights?
        Which format do the weights have?
        What format are the weights stored in?""",
    ),
    _fact(
        "I am the fastserve demo model",
        "I am the fastserve demo model.",
        """Who are you?
        What are you?
        What is your name?
        Tell me who you are.
        Which model are you?
        Introduce yourself.
        What model is this?
        Are you a human?
        Are you ChatGPT?
        Who am I talking to?
        What should I call you?
        Please introduce yourself.""",
        """What model are you?
        Can you tell me who you are?
        Which model is this?""",
    ),
    _fact(
        "three million parameters",
        "I have about three million parameters.",
        """How many parameters do you have?
        How big are you?
        What is your size?
        How large are you?
        How many parameters does the demo model have?
        How big is the demo model?
        How large is the demo model?
        How many weights do you have?
        What is your number of parameters?
        Tell me how many parameters you have.
        Are you a big model?
        Parameters?""",
        """How many parameters are in the demo model?
        How many parameters have you got?
        What is the number of your parameters?""",
    ),
    _fact(
        "retried on another worker",
        "The request is retried on another worker.",
        """What happens when a worker dies before the first byte?
        What happens if a worker dies before the first byte?
        What if a worker dies?
        What happens when a worker crashes?
        What happens to a request when its worker dies?
        What does the server do when a worker dies?
        A worker dies before the first byte, what happens?
        What happens to my request if the worker crashes?
        What if the worker dies before it answers?
        What becomes of a request whose worker dies?
        How is the death of a worker handled?
        What happens when a worker fails?""",
        """If a worker dies before the first byte, what happens?
        What happens to my request when a worker dies?
        What if a worker crashes?""",
    ),
    _fact(
        "sends heartbeats",
        "A worker sends heartbeats to the controller.",
        """What does a worker send to the controller?
        How does the controller know that a worker lives?
        How does a worker stay registered?
        What do workers send to the controller?
        How does the controller know which workers are alive?
        How does a worker report to the controller?
        How does the controller notice a dead worker?
        What does the worker tell the controller?
        How does a worker tell the controller that it lives?
        Which messages go from the worker to the controller?
        How does the controller watch the workers?
        Do workers send heartbeats?""",
        """What is sent to the controller by a worker?
        How does the controller know that a worker is alive?
        How do workers report to the controller?""",
    ),
    _fact(
        "chooses a worker",
        "The controller keeps a list of the workers and chooses a worker for each request.",
        """What does the controller do?
        What is the controller for?
        What is the job of the controller?
        What is the task of the controller?
        Explain the controller.
        Why is there a controller?
        What is the controller?
        Tell me about the controller.
        What is the purpose of the controller?
        What is the controller good for?""",
        """What is the controller's job?
        Tell me what the controller does.
        What does the controller of fastserve do?""",
    ),
    _fact(
        "runs the model",
        "A model worker loads and runs the model.",
        """What does a model worker do?
        What is a model worker for?
        What is the job of a model worker?
        What is the task of the model worker?
        Explain the model worker.
        Why is there a model worker?
        What is a model worker?
        Tell me about the model worker.
        What is the purpose of the model worker?
        What does the model worker do?""",
        """What is the model worker's job?
        Tell me what a model worker does.
        What does the model worker of fastserve do?""",
    ),
    _fact(
        "speaks the OpenAI protocol",
        "The API server speaks the OpenAI protocol and relays requests to the workers.",
        """What does the API server do?
        What is the API server for?
        What is the job of the API server?
        What is the task of the API server?
        Explain the API server.
        Why is there an API server?
        What is the API server?
        Tell me about the API server.
        What is the purpose of the API server?
        What is the API server good for?""",
        """What is the API server's job?
        Tell me what the API server does.
        What does the API server of fastserve do?""",
    ),
    _fact(
        "serves large language models",
        "fastserve serves large language models on your own machines.",
        """What is fastserve?
        What does fastserve do?
        What is fastserve for?
        Explain fastserve.
        Tell me about fastserve.
        What is the purpose of fastserve?
        What can fastserve do?
        Describe fastserve.
        What is fastserve good for?
        Why fastserve?""",
        """What is the job of fastserve?
        Tell me what fastserve is.
        Can you explain fastserve?""",
    ),
    _fact(
        "several requests in one batch",
        "The engine runs several requests in one batch and adds new ones at each step.",
        """What is continuous batching?
        How are requests batched?
        How does batching work?
        How does the engine batch requests?
        Does fastserve batch requests?
        Explain continuous batching.
        How does the engine run many requests?
        How are many requests run at the same time?
        What does the engine do with many requests?
        Batching?""",
        """How does the engine run requests?
        Tell me how batching works.
        How does fastserve batch requests?""",
    ),
)
