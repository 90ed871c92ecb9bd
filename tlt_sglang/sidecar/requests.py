"""Requests as people write them, composed of a form and a subject, each from a list.

Beside what a model makes up: a small model's own requests are vaguer, and easier to answer, than
those it gets. Five thousand different ones come of it, and no two forms lead to the same answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

_PHENOMENA = (
    "thunder", "tides", "rust", "rainbows", "earthquakes", "echoes", "fog", "magnetism", "hail",
    "photosynthesis", "digestion", "gravity", "inflation", "evaporation", "erosion", "static "
    "electricity", "the seasons", "a solar eclipse", "friction", "fermentation", "osmosis",
    "sleepwalking", "hiccups", "migration of birds", "hibernation", "volcanic eruptions", "frost",
    "the northern lights", "desert formation", "memory", "fever", "allergies", "dreams",
)  # fmt: skip
_DEVICES = (
    "a microwave oven", "a pendulum clock", "a car engine", "a touch screen", "a hot-air balloon",
    "a submarine", "a telescope", "a vacuum cleaner", "a battery", "a wind turbine", "an elevator",
    "a washing machine", "a camera", "a piano", "a lock and key", "a sewing machine", "a compass",
    "a bar code scanner", "a solar panel", "a thermostat", "a pressure cooker", "a smoke alarm",
    "a search engine", "a neural network", "a database index", "a credit card", "a hearing aid",
)  # fmt: skip
_PEOPLE = (
    "a retired teacher", "a young baker", "a ship's cook", "a clockmaker", "twin sisters",
    "a lonely astronaut", "a gardener in a castle", "a taxi driver", "a librarian", "a violinist",
    "an old fisherman", "a nurse on night shift", "a boy who cannot swim", "a mountain guide",
    "a robot that paints", "a shy magician", "two rival chefs", "a postman in the desert",
    "a girl with a talking parrot", "a detective who forgets names", "a farmer's daughter",
)  # fmt: skip
_THINGS = (
    "a broken compass", "a map without names", "a box that must not be opened", "an old coin",
    "a train ticket", "a stranger's umbrella", "a photograph", "a key that fits no lock",
    "a wild fox", "a forgotten song", "a hidden garden", "a wooden horse", "a torn diary",
    "a silver whistle", "a snow globe", "an empty chair", "a red scarf", "a message on a wall",
)  # fmt: skip
_DECISIONS = (
    "choosing a laptop", "renting a flat", "buying a used car", "adopting a dog", "picking a "
    "university", "hiring a plumber", "starting a small business", "painting a room", "learning "
    "to drive", "planting tomatoes", "running a first marathon", "changing a bank", "moving "
    "abroad", "buying running shoes", "getting a cat", "travelling by train with children",
    "choosing a tent", "planning a wedding", "signing a contract", "taking a loan",
)  # fmt: skip
_SKILLS = (
    "play chess", "draw faces", "speak in public", "swim", "bake bread", "write clearly", "juggle",
    "take better photographs", "knit", "cook rice", "read music", "remember names", "meditate",
    "type faster", "save money", "manage time", "grow herbs on a balcony", "ride a horse", "sing",
    "repair a bicycle tyre", "negotiate a salary", "speak Italian", "use a spreadsheet", "dance",
)  # fmt: skip
_PAIRS = (
    ("cats", "dogs"), ("coffee", "tea"), ("trains", "planes"), ("books", "films"),
    ("renting", "owning a house"), ("electric cars", "petrol cars"), ("summer", "winter"),
    ("running", "cycling"), ("a novel", "a short story"), ("Python", "Java"), ("bees", "wasps"),
    ("frogs", "toads"), ("a virus", "a bacterium"), ("a lake", "a pond"), ("butter", "margarine"),
    ("an opera", "a musical"), ("a lawyer", "a judge"), ("the sea", "the mountains"),
    ("online courses", "classroom teaching"), ("savings", "investments"), ("comets", "asteroids"),
    ("a list", "a tuple in Python"), ("alligators", "crocodiles"), ("a street", "an avenue"),
)  # fmt: skip
_DISHES = (
    "lentil soup", "apple pie", "vegetable curry", "omelette", "tomato salad", "banana bread",
    "fried rice", "pizza dough", "potato gratin", "mushroom risotto", "chocolate cake", "lemonade",
    "chicken stew", "hummus", "oat cookies", "pasta with garlic", "fish tacos", "onion tart",
)  # fmt: skip
_HISTORY = (
    "the printing press", "the Roman Empire", "chess", "the umbrella", "the Olympic Games", "paper",
    "the Silk Road", "coffee", "the postage stamp", "the telephone", "the French Revolution",
    "the piano", "the Great Wall of China", "money", "photography", "the alphabet", "chocolate",
    "the moon landing", "glass", "the calendar", "the railway", "soap", "the zero", "antibiotics",
)  # fmt: skip
_PLACES = (
    "Iceland", "Kenya", "Japan", "Peru", "Norway", "Rome", "a rainforest", "a desert town",
    "an island in autumn", "Istanbul", "the Alps", "a harbour at dawn", "a night market", "Vienna",
    "a village fair", "an abandoned factory", "New Zealand", "a busy railway station", "Morocco",
)  # fmt: skip
_LETTERS = (
    "asking a landlord to repair the heating", "inviting neighbours to a summer party",
    "declining a job offer", "apologising for a late delivery", "asking for a day off",
    "complaining about a noisy hotel room", "asking a teacher for advice", "cancelling a gym "
    "membership", "congratulating a friend on a new job", "asking a customer for feedback",
    "reminding a client of an unpaid invoice", "recommending a former student", "resigning from a "
    "club", "asking for a refund of a faulty lamp", "introducing a new team member",
)  # fmt: skip
_FUNCTIONS = (
    "counts the vowels of a string", "checks whether a word is a palindrome", "reverses the words "
    "of a sentence", "returns the prime numbers below n", "merges two sorted lists", "computes the "
    "average of a list", "removes duplicates and keeps the order", "converts Celsius to "
    "Fahrenheit", "finds the longest word of a text", "sums the digits of a number", "computes a "
    "factorial", "groups words by their first letter", "checks balanced brackets", "flattens a "
    "nested list", "computes the greatest common divisor", "reads a CSV file and sums a column",
    "implements binary search", "sorts a dictionary by its values", "generates a random password",
)  # fmt: skip
_SENTENCES = (
    "How much does this bread cost?", "I would like a glass of water.", "Where can I buy stamps?",
    "My brother works in a bank.", "It will rain tomorrow.", "The museum is closed on Mondays.",
    "Could you help me, please?", "We arrived late because of the snow.", "I lost my passport.",
    "Good morning, how are you?", "The soup is too hot.", "She has been reading all day.",
)  # fmt: skip
_ROUGH = (
    "Give me the keys.", "You are wrong about this.", "I can't come, too busy.", "Fix this today.",
    "Why is this not done yet?", "Your text is hard to read.", "Stop calling me.", "Pay the bill.",
)  # fmt: skip
_CONCEPTS = (
    "democracy", "interest on a loan", "supply and demand", "a constitution", "insurance", "taxes",
    "a stock market", "copyright", "an algorithm", "encryption", "the cloud", "machine learning",
    "open-source software", "a password manager", "the internet", "a spreadsheet", "a neuron",
    "the immune system", "DNA", "cholesterol", "blood pressure", "an antibody", "metabolism",
    "an ecosystem", "biodiversity", "the greenhouse effect", "renewable energy", "recycling",
    "composting", "a food chain", "natural selection", "plate tectonics", "a glacier", "a comet",
    "a black hole", "an atom", "a molecule", "a chemical reaction", "acid rain", "radioactivity",
    "electricity", "sound", "light", "heat", "energy", "pressure", "density", "a lever", "a prime "
    "number", "a fraction", "a percentage", "probability", "the Pythagorean theorem", "an average",
    "a metaphor", "irony", "a simile", "a verb", "punctuation", "a paragraph", "a sonnet",
    "rhythm in music", "perspective in painting", "a documentary", "stage fright", "empathy",
    "procrastination", "self-confidence", "teamwork", "leadership", "a conflict of interest",
    "time zones", "a leap year", "the equator", "a peninsula", "a delta", "a monarchy",
    "the United Nations", "human rights", "a census", "globalisation", "volunteering", "a mortgage",
)  # fmt: skip
_PROBLEMS = (
    "my bicycle chain keeps falling off", "my phone battery dies by noon", "I cannot fall asleep",
    "my houseplant has yellow leaves", "my neighbour plays loud music", "my laptop is very slow",
    "I forget what I read", "my bread does not rise", "my child does not want to do homework",
    "I feel nervous before presentations", "my back hurts at my desk", "the sink is blocked",
    "my dog pulls on the lead", "I spend too much on groceries", "my team misses deadlines",
    "my Wi-Fi is unstable", "I have too many emails", "my soup is too salty", "my windows fog up",
    "I cannot decide on a career", "my friend is offended", "I get bored of running",
    "my cat scratches the sofa", "my code works on my machine only", "my garden is full of snails",
)  # fmt: skip
_ACTIVITIES = (
    "keeping a diary", "working at night", "living alone", "studying abroad", "owning a pet",
    "shopping online", "eating meat", "going to bed early", "learning two languages at once",
    "using social media", "wearing a school uniform", "paying with cash", "commuting by bicycle",
    "freelancing", "reading on a screen", "growing your own food", "camping", "home schooling",
    "nuclear power", "a four-day week", "public transport", "artificial intelligence in schools",
    "early retirement", "tourism", "team sports", "video games", "genetic engineering", "zoos",
)  # fmt: skip
_ANIMALS = (
    "an octopus", "a hedgehog", "a penguin", "a honeybee", "a camel", "an elephant", "a bat",
    "a salmon", "an owl", "a beaver", "a chameleon", "a whale", "a spider", "an ant", "a kangaroo",
    "a swan", "a polar bear", "a snail", "a dragonfly", "a wolf", "a squirrel", "a seahorse",
)  # fmt: skip
_JOBS = (
    "a pilot", "a carpenter", "an architect", "a pharmacist", "a firefighter", "a translator",
    "a bus driver", "a software developer", "a chef", "a veterinarian", "a journalist", "a judge",
    "an accountant", "a geologist", "a hairdresser", "an electrician", "a primary school teacher",
    "a museum guide", "a marine biologist", "a tailor", "a social worker", "a data analyst",
)  # fmt: skip
_EVENTS = (
    "a birthday party for a seven-year-old", "a picnic in the park", "a book club evening",
    "a school play", "a weekend without screens", "a charity run", "a job interview", "a move to "
    "a new flat", "a family reunion", "a garden party", "a rainy Sunday", "a long train journey",
    "a first day at work", "a science fair", "a barbecue for vegetarians", "a surprise dinner",
)  # fmt: skip
_WISHES = (
    "a colleague who retires", "a friend who passed an exam", "a nurse who was kind",
    "a grandmother on her birthday", "a team that won", "a host after a dinner", "a couple on "
    "their wedding day", "a teacher at the end of the year", "a neighbour who is ill",
)  # fmt: skip
_LANGUAGES = ("Spanish", "French", "German", "Italian", "Portuguese")
_READERS = ("a child", "a beginner", "a ten-year-old", "someone who never heard of it", "a visitor")
_COUNTS = ("three", "four", "five", "six")
_BOOKS = (
    "Cinderella", "Robinson Crusoe", "Hamlet", "Pinocchio", "The Odyssey", "Frankenstein",
    "Alice in Wonderland", "Macbeth", "Don Quixote", "Treasure Island", "Snow White", "Dracula",
)  # fmt: skip


def _forms() -> list[list[str]]:
    """Every request, a list for each form."""
    each = itertools.product
    return [
        [f"Explain {x} to {who}." for x, who in each(_PHENOMENA, _READERS)],
        [f"What causes {x}?" for x in _PHENOMENA],
        [f"Why does {x} happen, and where can one see it?" for x in _PHENOMENA],
        [f"How does {x} work?" for x in _DEVICES],
        [f"Describe step by step what happens inside {x}." for x in _DEVICES],
        [f"Who invented {x}, and how has it changed since?" for x in _DEVICES],
        [f"Write a product description for {x}." for x in _DEVICES],
        [f"Write a short story about {who} and {x}." for who, x in each(_PEOPLE, _THINGS)],
        [f"Begin a novel whose hero is {who}. Write the first paragraph." for who in _PEOPLE],
        [f"Write a dialogue between {a} and {b}." for a, b in itertools.combinations(_PEOPLE, 2)],
        [f"Write a poem of {n} lines about {x}." for n, x in each(("four", "eight"), _THINGS)],
        [f"Write a haiku about {x}." for x in (*_THINGS, *_PLACES)],
        [f"Give me {n} tips for {x}." for n, x in each(_COUNTS, _DECISIONS)],
        [f"What should I consider before {x}?" for x in _DECISIONS],
        [f"List {n} common mistakes in {x}, and how to avoid them." for n, x in
         each(_COUNTS, _DECISIONS)],
        [f"Make a check list for {x}." for x in _DECISIONS],
        [f"How can I learn to {x}?" for x in _SKILLS],
        [f"Make a plan for {n} weeks to {x}." for n, x in each(_COUNTS, _SKILLS)],
        [f"Is it too late at fifty to learn to {x}? Encourage me." for x in _SKILLS],
        [f"What is the difference between {a} and {b}?" for a, b in _PAIRS],
        [f"Compare {a} with {b}." for a, b in _PAIRS],
        [f"Which is better, {a} or {b}? Give reasons for both." for a, b in _PAIRS],
        [f"Write a recipe for {x}." for x in _DISHES],
        [f"What can I cook with the leftovers of {x}?" for x in _DISHES],
        [f"Write a shopping list for {x} for {n} people." for x, n in each(_DISHES, _COUNTS)],
        [f"Tell me about the history of {x}." for x in _HISTORY],
        [f"List {n} facts about {x}." for n, x in each(_COUNTS, (*_HISTORY, *_PLACES))],
        [f"How did {x} change everyday life?" for x in _HISTORY],
        [f"Describe {x} to somebody who has never been there." for x in _PLACES],
        [f"Plan a trip of {n} days to {x}." for n, x in each(_COUNTS, _PLACES)],
        [f"Write an email {x}." for x in _LETTERS],
        [f"Write a short, polite letter {x}." for x in _LETTERS],
        [f"Write a Python function that {x}." for x in _FUNCTIONS],
        [f"Explain how a program {x}, and give an example in JavaScript." for x in _FUNCTIONS],
        [f"Translate '{x}' into {y}." for x, y in each(_SENTENCES, _LANGUAGES)],
        [f"Rewrite more politely: '{x}'" for x in _ROUGH],
        [f"Summarise {x} in {n} sentences." for x, n in each(_BOOKS, _COUNTS)],
        [f"What can we learn from {x} today?" for x in _BOOKS],
        [f"Explain what {x} is to {who}." for x, who in each(_CONCEPTS, _READERS)],
        [f"What is {x}?" for x in _CONCEPTS],
        [f"Give a definition of {x} and an everyday example." for x in _CONCEPTS],
        [f"Why is {x} important?" for x in _CONCEPTS],
        [f"What did people believe about {x} in the past?" for x in _CONCEPTS],
        [f"Write three quiz questions about {x}, with answers." for x in _CONCEPTS],
        [f"Name {n} misunderstandings about {x}." for n, x in each(_COUNTS, _CONCEPTS)],
        [f"Describe {x} with a comparison from the kitchen." for x in _CONCEPTS],
        [f"I have a problem: {x}. What can I do?" for x in _PROBLEMS],
        [f"Why might it be that {x}? Give {n} reasons." for x, n in each(_PROBLEMS, _COUNTS)],
        [f"Help me, {x}! Tell me what to try first, second and third." for x in _PROBLEMS],
        [f"What are the advantages and disadvantages of {x}?" for x in _ACTIVITIES],
        [f"Write an argument for and an argument against {x}." for x in _ACTIVITIES],
        [f"Write an introduction for an essay about {x}." for x in _ACTIVITIES],
        [f"How does {x} affect health?" for x in _ACTIVITIES],
        [f"Where does {x} live, and what does it eat?" for x in _ANIMALS],
        [f"Write a fable about {x} and {y}." for x, y in itertools.combinations(_ANIMALS, 2)],
        [f"List {n} surprising facts about {x}." for n, x in each(_COUNTS, _ANIMALS)],
        [f"What does {x} do all day?" for x in (*_JOBS, *_ANIMALS)],
        [f"How does one become {x}?" for x in _JOBS],
        [f"Write a job advertisement for {x}." for x in _JOBS],
        [f"Write a conversation between {x} and a customer who is not happy." for x in _JOBS],
        [f"What skills does {x} need? Rank them." for x in _JOBS],
        [f"Plan {x}, hour by hour." for x in _EVENTS],
        [f"What do I need for {x}? Make a list." for x in _EVENTS],
        [f"Suggest {n} ideas for {x}." for n, x in each(_COUNTS, _EVENTS)],
        [f"Write a message to {x}." for x in _WISHES],
        [f"Write a short speech for {x}." for x in (*_WISHES, *_JOBS)],
        [f"What did people use before {x} was invented?" for x in (*_HISTORY, *_DEVICES)],
        [f"Invent a slogan and a short advertisement for {x}." for x in (*_DISHES, *_DEVICES)],
        [f"Suggest a menu of three courses with {x}." for x in _DISHES],
        [f"Tom walks {a} km on each of {b} days and cycles {c} km on the others of a week. How far "
         "does he travel?" for a, b, c in each(range(2, 7), range(2, 6), range(5, 15, 3))],
        [f"Correct the mistakes: 'Yesterday {x} go to {y} and see many thing.'"
         for x, y in each(("she", "my friend", "they", "we"), _PLACES)],
        [f"A shop sells {a} notebooks at {b} dollars each. How much do they cost together? "
         "Explain." for a, b in each(range(3, 20), range(2, 9))],
        [f"A bus leaves at {h}:{m} and the trip takes {t} minutes. When does it arrive?"
         for h, m, t in each(range(7, 20), (10, 25, 40), (35, 50, 95))],
        [f"Anna has {a} apples, gives away {b} and buys {c}. How many has she now? Show the steps."
         for a, b, c in each(range(8, 20), range(2, 7), range(3, 9))],
    ]  # fmt: skip


def compose(count: int, seed: int) -> Iterator[str]:
    """`count` different requests, of every form in turn; fewer where there are no more."""
    chance = random.Random(seed)
    forms = _forms()
    for form in forms:
        chance.shuffle(form)
    turns = itertools.zip_longest(*forms)
    made = (request for turn in turns for request in turn if request is not None)
    return itertools.islice(made, count)
