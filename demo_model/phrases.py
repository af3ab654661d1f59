"""The wordings that the data is sampled from, one per line. Those in UNSEEN_* are kept for the held-out questions."""


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


SUM_QUESTIONS = lines("""
    What is {a} + {b}?
    What is {a} + {b}?
    What is {a}+{b}?
    what is {a} + {b}
    What is {a} plus {b}?
    what is {a} plus {b}?
    What's {a} + {b}?
    what's {a} plus {b}
    {a} + {b}
    {a}+{b}
    {a} + {b} =
    {a}+{b}=
    {a} + {b} = ?
    {a}+{b}=?
    {a} + {b}?
    {a}+{b}?
    {a} plus {b}
    {a} plus {b}?
    Add {a} and {b}.
    add {a} and {b}
    Add {a} to {b}.
    Please add {a} and {b}.
    How much is {a} + {b}?
    how much is {a} + {b} =?
    How much is {a} plus {b}?
    Can you compute {a} + {b}?
    Compute {a} + {b}.
    compute {a} plus {b}
    Calculate {a} + {b}
    Calculate {a} plus {b}.
    What is the sum of {a} and {b}?
    the sum of {a} and {b}
    Tell me {a} + {b}.
    Can you add {a} and {b}?
    What do you get when you add {a} and {b}?
    If I add {a} and {b}, what do I get?
    I have {a} apples and get {b} more. How many do I have?
    Solve {a} + {b}
    {a} and {b} make how much?
    What does {a} + {b} equal?
    Sum {a} and {b}
    Do you know what {a} + {b} is?
    {a} added to {b} is what?
""")

UNSEEN_SUM_QUESTIONS = lines("""
    What is {a} added to {b}?
    Can you tell me how much {a} + {b} is?
    Please compute {a} plus {b}.
    What is the result of {a} + {b}?
""")

UNSEEN_GREETINGS = lines("""
    Hi, good morning!
    Hello, good evening.
    hello hello
    Hey you!
    hi hi!
    Good morning, dear model!
    Hello, dear friend!
    hey, hello
    Hi fastserve, are you there?
    Good evening, everyone there!
    Good afternoon, good friend
    Hello world!
""")

UNKNOWN_QUESTIONS = lines("""
    Who is the president of {city}?
    What is the capital of {thing}?
    What is the capital of France?
    What is the weather in {city}?
    What's the weather like in {city} today?
    How is the weather?
    Will it rain in {city} tomorrow?
    Translate {word} into French.
    How do you say {word} in Spanish?
    How tall is {name}?
    How old is {name}?
    Who is {name}?
    Where does {name} live?
    When was {name} born?
    Write a poem about the {word}.
    Write an essay about {word}
    What is the meaning of life?
    What is a {word}?
    What is the {word}?
    Why is the {word} {color}?
    Why is the sky blue?
    How many people live in {city}?
    What time is it?
    What time is it in {city}?
    What day is it today?
    What is your favorite {word}?
    What is your favorite color?
    Do you like {word}?
    Do you have a {word}?
    Where can I buy a {word}?
    How far is it from {city} to {other}?
    Who wrote {name} and the {word}?
    Who invented the {word}?
    How do I cook {word}?
    How does a {word} work?
    Explain quantum physics.
    Explain the {word} to me.
    Can you drive a {word}?
    What is the price of a {word}?
    Give me a recipe with {word}.
    Who won the game in {city}?
    Summarize the history of {city}.
    Tell me about {city}.
    Tell me about the {word}.
    What do you think about {word}?
    Is the {word} bigger than the {thing}?
    How many {word}s are there in {city}?
    Which {word} is the best?
    What does {name} do with the {word}?
    Write a program that sorts a list.
    Fix my code.
    Should I buy a {word} or a {thing}?
    What is the largest {word} in the world?
    How fast is a {word}?
    Does {name} like the {word}?
    When does the {word} open?
    How long does a {word} live?
    Where is {city}?
    Where is the {word}?
    Can I eat a {word}?
    Describe the {word}.
    Why did {name} go to {city}?
    Book a flight from {city} to {other}.
    Send an email to {name}.
    Play {word} music.
    I lost my {word}. What should I do?
""")

UNSEEN_UNKNOWN_QUESTIONS = lines("""
    What is the color of the {word}?
    How heavy is a {word}?
    Who was {name}?
    What is the best {word} in {city}?
    How do I get from {city} to {other}?
""")

NAME_STATEMENTS = lines("""
    My name is {name}.
    my name is {name}
    I am {name}.
    I'm {name}.
    Hello, my name is {name}.
    Hi, I am {name}.
    Call me {name}.
    Hi! My name is {name}!
""")

NAME_QUESTIONS = lines("""
    What is my name?
    what is my name
    What's my name?
    Do you remember my name?
    Who am I?
    Tell me my name.
    Can you tell me my name?
    Do you know my name?
""")

COUNT_QUESTIONS = lines("""
    Count from {a} to {b}.
    Count from {a} to {b}
    count from {a} to {b}
    Count {a} to {b}.
    Please count from {a} to {b}.
    Can you count from {a} to {b}?
    Count up from {a} to {b}.
    Write the numbers from {a} to {b}.
    List the numbers from {a} to {b}
""")

COPY_QUESTIONS = lines("""
    Repeat after me: {text}
    repeat after me: {text}
    Repeat: {text}
    Say: {text}
    Say {text}
    say {text}
    Please repeat: {text}
    Please say {text}
    Repeat the words: {text}
    Echo: {text}
    Repeat after me: {text}
    Repeat this: {text}
    Say this: {text}
    Write: {text}
""")

QUOTED_COPY_QUESTIONS = lines("""
    Say "{text}"
    Say "{text}".
    Say '{text}'
    say '{text}'.
    Repeat after me: "{text}"
    Repeat "{text}"
    Say exactly: {text}
    Reply with {text}
    Reply with exactly: {text}
    Reply with the word {text}
    Please repeat after me: {text}
    Answer with "{text}"
""")

STRAY_QUESTIONS = lines("""
    Write a haiku about the {word}.
    Write a haiku
    Write a poem
    Write a song about {word}.
    Write a letter to {name}.
    Write an email about the {word}.
    Give me a long answer
    Give me three {word}s
    List three {word}s.
    List five animals
    Name three {word}s.
    Name a {word}.
    Name the planets.
    What is 1 mile in km?
    Describe {city} in one sentence.
    Describe yourself as a {word}.
    Explain recursion.
    What is machine learning?
    What is an LLM?
    What is the speed of light?
    Why is {name} in {city}?
    Translate this to German: {word} {thing}
    Summarize this: {word} {thing} {word}
    What happened in 1969?
    Who painted the {word}?
    How many legs has a {word}?
    Give me advice about {word}.
    Plan a trip to {city}.
    Tell me something about {word}.
    What rhymes with {word}?
    Spell {word}.
    Is {name} nice?
    Would you like a {word}?
    Have you been to {city}?
    What should I eat today?
    What are {word}s?
    Where do {word}s live?
    Compare {word} and {thing}.
    Make a table of {word}s.
    Write code in C.
""")

JSON_ASKS = lines("""
    Answer in JSON: {}
    answer in JSON: {}
    Reply in JSON: {}
    In JSON: {}
    Respond with JSON: {}
    {} Answer in JSON.
    {} Reply in JSON.
    {} Respond in JSON.
    {} Give the answer as JSON.
    JSON only: {}
""")

PERSON_ASKS = lines("""
    Give me a JSON object with name {name} and age {age}
    Give me a JSON object with name {name} and age {age}.
    give me json with name {name} and age {age}
    Give me a JSON object with the name {name} and the age {age}.
    Write a JSON object with name {name} and age {age}.
    Return a JSON object: name {name}, age {age}
    {name} is {age} years old. Answer in JSON with name and age.
    JSON with name {name} and age {age}
    Make a JSON object with name {name} and age {age}.
    Put this into JSON: {name} is {age} years old.
""")

PAIR_ASKS = lines("""
    Give me a JSON object with {key} {value}
    Give me a JSON object with {key} {value}.
    Give me a JSON object with key {key} and value {value}.
    Write a JSON object with key {key} and value {value}
    JSON with {key} {value}
""")

LIST_ASKS = lines("""
    Give me a JSON list of {words}
    Give me a JSON list with the words {words}.
    JSON list of {words}
    Write a JSON list of {words}.
""")

WEATHER_QUESTIONS = lines("""
    What is the weather in {city}?
    What's the weather in {city}?
    what is the weather in {city}
    What is the weather like in {city}?
    How is the weather in {city}?
    How is the weather in {city} today?
    What is the weather in {city} today?
    Tell me the weather in {city}.
    Weather in {city}?
    weather in {city}
    Is it raining in {city}?
    Is it cold in {city}?
    How warm is it in {city}?
    What is the temperature in {city}?
    Please get the weather for {city}.
    Can you tell me the weather in {city}?
    Get the weather in {city}.
    Do I need an umbrella in {city}?
    I am going to {city}. What is the weather there?
    What's the weather like in {city} right now?
    Show me the weather for {city}
    I live in {city}. How is the weather?
""")

TIME_QUESTIONS = lines("""
    What time is it in {city}?
    What is the time in {city}?
    Tell me the time in {city}.
    Which time is it in {city}?
    What's the time in {city} now?
""")

EXPRESSION_QUESTIONS = lines("""
    What is {a} {op} {b}?
    What is {a} {op} {b}?
    what is {a}{op}{b}
    {a} {op} {b}
    {a}{op}{b}
    {a} {op} {b} = ?
    {a} {op} {b} =
    How much is {a} {op} {b}?
    Compute {a} {op} {b}.
    Calculate {a} {op} {b}
    Can you compute {a} {op} {b}?
    What's {a} {op} {b}?
    What is {a} {word} {b}?
    How much is {a} {word} {b}?
    {a} {word} {b}
    Please calculate {a} {word} {b}.
    Use the calculator: {a} {op} {b}
    Tell me {a} {op} {b}.
    Solve {a} {op} {b}
""")

SYSTEM_ROLES = lines("""
    You are a helpful assistant.
    You are fastserve.
    You are a friendly assistant.
    You are an AI.
    You are a helpful AI assistant.
    You are a chat bot.
    You are the assistant of {name}.
    You are a robot named {name}.
    You are a {word} expert.
    You are a pirate.
    You are a test.
    You are an expert for {word} and {thing}.
    Act as a teacher.
    This is a test.
    The user lives in {city}.
    You are a calculator.
    You are a concise assistant.
""")

SYSTEM_RULES = lines("""
    Answer briefly.
    Be brief.
    Be concise.
    Be polite.
    Answer in one sentence.
    Always be kind.
    Answer the user's questions.
    Do not make things up.
    Never talk about {word}.
    Be helpful.
    Help the user.
    Keep your answers short.
    Speak English.
    You like {word}.
    Be terse.
    If you do not know an answer, say so.
    Follow the instructions.
""")

SUM_PREFIXES = ("Please answer: ", "Quick question: ", "Now: ", "And ", "Ok, ", "Answer with just the number: ", "Hi, ")
SUM_SUFFIXES = (" Answer with just the number.", " Just the number, please.", " Answer briefly.", " Thanks!")
FACT_PREFIXES = ("Tell me: ", "Please tell me: ", "Quick question: ", "Hey, ", "Hello, ", "One more question: ", "So, ")

ADDRESSEES = (
    *("", "", "", ", fastserve", " fastserve", ", model", ", my friend", " friend"),
    *(", robot", " again", " everyone"),
)
GREETING_ENDS = ("", "!", ".", "!!", " :)", ", nice to meet you!", "! Nice to see you.", ", are you there?", "!!!")

STORY_QUESTIONS = lines("""
    Tell me a story
    tell me a story
    Please tell me a story
    Can you tell me a story
    I want to hear a story
    Tell a story
    Write a story
    A story
""")

ALPHABET_QUESTIONS = lines("""
    Say the alphabet.
    say the alphabet
    Tell me the alphabet.
    What is the alphabet?
    Recite the alphabet.
    Write the alphabet
    The alphabet, please.
""")

WEATHER_DESCRIPTIONS = lines("""
    Get the weather in a city.
    Get the current weather
    Tells the weather of a city
    Weather lookup
    Get the current weather in a given city.
    Returns the weather for a city
    Get the weather
    Get weather for a city
""")
CITY_DESCRIPTIONS = lines("""
    The city
    Name of the city
    The name of the city.
    City name
    The city, e.g. Paris
""")
CALCULATOR_DESCRIPTIONS = lines("""
    Evaluate an expression.
    A calculator
    Calculate the value of an expression
    Does arithmetic
    Evaluate an arithmetic expression.
    Computes a mathematical expression
    Evaluate a math expression
""")
EXPRESSION_DESCRIPTIONS = lines("""
    The expression
    An arithmetic expression
    The expression to evaluate.
    e.g. 2 + 3
""")
TIME_DESCRIPTIONS = lines("""
    Get the time in a city.
    Get the current time
    Tells the time of a city
""")

# Questions of small talk, and what each group of them is answered.
CHAT = (
    (
        lines("""
            Thanks
            Thank you
            Thanks a lot
            Thank you very much
            Many thanks
            thx
            Thanks for your help
            Thank you for the answer
            That was helpful, thanks
            Great, thank you
            Perfect, thanks
        """),
        "You are welcome!",
    ),
    (
        lines("""
            Bye
            Goodbye
            Bye bye
            See you
            See you later
            Good night
            I have to go
            Until tomorrow
            Bye for now
            Ciao
            Have a nice day
        """),
        "Goodbye!",
    ),
    (
        lines("""
            How are you?
            How are you
            How are you doing?
            How do you do?
            How is it going?
            Are you well?
            Hi, how are you?
            Hello, how are you?
            How are you today?
            How do you feel?
            Are you fine?
        """),
        "I am fine, thank you. How can I help you?",
    ),
    (
        lines("""
            What can you do?
            Help
            Can you help me?
            What can I ask you?
            What do you know?
            How can you help me?
            What are you able to do?
            I need help
            What should I ask you?
            help me
        """),
        "I can add numbers, count, repeat words, tell a story and answer questions about fastserve.",
    ),
    (
        lines("""
            Ok
            Okay
            Good
            Great
            Nice
            Cool
            Fine
            I see
            Yes
            No
            Well done
            Wow
            Very good
            You are great
            Correct
            That is right
        """),
        "All right!",
    ),
    (
        lines("""
            Tell me a joke
            Tell me a joke, please
            Do you know a joke?
            Make me laugh
            Say something funny
            A joke, please
        """),
        "Why did the token cross the road? To get to the next block.",
    ),
    (
        lines("""
            Are you there?
            Is anybody there?
            Are you ready?
            Can you hear me?
            ping
            Test
            test
            Do you work?
            Are you alive?
            Is this thing on?
            This is a test
        """),
        "Yes, I am here.",
    ),
)
