"""Word lists the data is drawn from. Order does not matter; a word's absence from training is decided in data.py."""

WORDS = (
    "apple banana cherry lemon orange peach pear plum grape melon mango kiwi carrot potato tomato onion pepper garlic "
    "bread butter cheese milk sugar salt honey coffee tea water juice soup rice pasta cake cookie "
    "red blue green yellow purple pink brown black white silver gold "
    "cat dog horse cow sheep goat pig duck goose chicken rabbit mouse fox wolf bear lion tiger zebra monkey elephant "
    "whale shark dolphin turtle frog snake eagle owl robin sparrow bee ant spider "
    "tree flower rose tulip grass leaf forest river lake ocean beach island mountain valley desert hill stone sand "
    "sun moon star sky cloud rain snow wind storm thunder summer winter spring autumn "
    "house garden kitchen window door table chair lamp bed mirror clock carpet roof wall floor "
    "car train plane boat ship bike truck bus rocket wheel engine bridge road street station harbor "
    "book paper pencil pen letter story poem song music piano guitar violin drum flute dance "
    "king queen knight castle dragon wizard sword shield crown treasure pirate robot computer keyboard screen "
    "doctor teacher farmer baker painter singer driver sailor pilot writer "
    "happy quick slow bright quiet strong gentle brave clever warm cold fresh "
    "alpha beta gamma delta omega hello world test request number one two three four five six seven eight nine ten"
).split()

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karl Laura Max Nina Oscar Paula Quentin Rosa Simon Tina Uwe "
    "Vera Walter Xenia Yann Zoe Alice Bob Carol Dan Eve Frank Gina Hugo Iris John Kate Leo Mary Noah Olga Peter Ruth "
    "Sam Tom Lucy Martin Sara Paul Julia Ali Fatima Wei Ling Yuki Hiro Priya Arjun Ivan Elena"
).split()

CITIES = (
    "Paris,London,Berlin,Madrid,Rome,Vienna,Prague,Warsaw,Budapest,Lisbon,Dublin,Oslo,Stockholm,Helsinki,Copenhagen,"
    "Amsterdam,Brussels,Zurich,Geneva,Athens,Istanbul,Moscow,Kyiv,Cairo,Nairobi,Lagos,Casablanca,Dubai,Mumbai,Delhi,"
    "Bangkok,Singapore,Jakarta,Manila,Hanoi,Beijing,Shanghai,Tokyo,Osaka,Seoul,Sydney,Melbourne,Auckland,Toronto,"
    "Montreal,Vancouver,Chicago,Boston,Seattle,Denver,Dallas,Houston,Miami,Atlanta,Phoenix,Lima,Bogota,Santiago,"
    "Quito,Havana,Munich,Hamburg,Milan,Venice,Barcelona,Lyon,Porto,Krakow,New York,San Francisco,Los Angeles,"
    "Hong Kong,Cape Town,Mexico City,Buenos Aires"
).split(",")

# Cities, names and words that training never shows: copying them is the proof that the model copies.
UNSEEN_CITIES = ("Rotterdam", "Bristol", "Nagoya", "Portland", "Dresden", "Valencia", "Hanover", "Santa Fe")
UNSEEN_NAMES = ("Helena", "Robert", "Monica", "Daniel", "Marina", "Victor")

CONDITIONS = "sunny cloudy rainy snowy windy foggy stormy clear warm cold".split()

COLORS = "red blue green yellow purple pink brown black white".split()

SYLLABLES = "ba be bo da de do fa fi ga go ha he ka ki ko la le li lo ma me mi mo na ne no pa pe po ra re ri ro sa se si so ta te ti to va ve vi wa we ya yo za zo".split()  # noqa: E501
CODAS = ("", "", "n", "r", "s", "l", "m", "t", "k", "nd", "rt")
