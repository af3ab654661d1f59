"""The words, names and cities that the data is sampled from."""


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def titles(text: str) -> tuple[str, ...]:
    """Names of one or more words, separated by commas."""
    return tuple(" ".join(title.split()) for title in text.split(","))


WORDS = words("""
    apple banana cherry lemon orange peach pear plum grape melon mango kiwi carrot potato tomato onion pepper garlic
    bread butter cheese milk sugar salt honey coffee tea water juice soup rice pasta cake cookie red blue green
    yellow purple pink brown black white silver gold cat dog horse cow sheep goat pig duck goose chicken rabbit
    mouse fox wolf bear lion tiger zebra monkey elephant whale shark dolphin turtle frog snake eagle owl robin
    sparrow bee ant spider tree flower rose tulip grass leaf forest river lake ocean beach island mountain valley
    desert hill stone sand sun moon star sky cloud rain snow wind storm thunder summer winter spring autumn house
    garden kitchen window door table chair lamp bed mirror clock carpet roof wall floor car train plane boat ship
    bike truck bus rocket wheel engine bridge road street station harbor book paper pencil pen letter story poem
    song music piano guitar violin drum flute dance king queen knight castle dragon wizard sword shield crown
    treasure pirate robot computer keyboard screen doctor teacher farmer baker painter singer driver sailor pilot
    writer happy quick slow bright quiet strong gentle brave clever warm cold fresh alpha beta gamma delta omega
    hello world test request number one two three four five six seven eight nine ten
""")

NAMES = words("""
    Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karl Laura Max Nina Oscar Paula Quentin Rosa Simon Tina Uwe
    Vera Walter Xenia Yann Zoe Alice Bob Carol Dan Eve Frank Gina Hugo Iris John Kate Leo Mary Noah Olga Peter Ruth
    Sam Tom Lucy Martin Sara Paul Julia Ali Fatima Wei Ling Yuki Hiro Priya Arjun Ivan Elena
""")

CITIES = titles("""
    Paris, London, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Budapest, Lisbon, Dublin, Oslo, Stockholm,
    Helsinki, Copenhagen, Amsterdam, Brussels, Zurich, Geneva, Athens, Istanbul, Moscow, Kyiv, Cairo, Nairobi,
    Lagos, Casablanca, Dubai, Mumbai, Delhi, Bangkok, Singapore, Jakarta, Manila, Hanoi, Beijing, Shanghai, Tokyo,
    Osaka, Seoul, Sydney, Melbourne, Auckland, Toronto, Montreal, Vancouver, Chicago, Boston, Seattle, Denver,
    Dallas, Houston, Miami, Atlanta, Phoenix, Lima, Bogota, Santiago, Quito, Havana, Munich, Hamburg, Milan, Venice,
    Barcelona, Lyon, Porto, Krakow, New York, San Francisco, Los Angeles, Hong Kong, Cape Town, Mexico City, Buenos
    Aires
""")

# Training never shows these: to write them, the model must copy.
UNSEEN_CITIES = titles("Rotterdam, Bristol, Nagoya, Portland, Dresden, Valencia, Hanover, Santa Fe")
UNSEEN_NAMES = words("Helena Robert Monica Daniel Marina Victor")

CONDITIONS = words("sunny cloudy rainy snowy windy foggy stormy clear warm cold")
COLORS = words("red blue green yellow purple pink brown black white")

# What made-up words are put together from.
ONSETS = (
    *words("b c d f g h j k l m n p q r s t v w x y z br ch cl cr dr fl fr gl gr kr pl pr sch sh sl st th tr"),
    "",
)
NUCLEI = words("a e i o u a e i o u ai au ea ee ei ia ie io oo ou")
CODAS = ("", "", "", "", *words("n r s l m t k d g nd rt st ch ng ll ck ss tt th x"))
