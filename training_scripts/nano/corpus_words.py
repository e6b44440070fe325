"""The words and facts of the nano corpus: small tables that `make_corpus.py` builds its conversations from."""

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    "twelfth",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# Month: season (north of the equator), days.
MONTHS = {
    "January": ("winter", "thirty one"),
    "February": ("winter", "twenty eight"),
    "March": ("spring", "thirty one"),
    "April": ("spring", "thirty"),
    "May": ("spring", "thirty one"),
    "June": ("summer", "thirty"),
    "July": ("summer", "thirty one"),
    "August": ("summer", "thirty one"),
    "September": ("autumn", "thirty"),
    "October": ("autumn", "thirty one"),
    "November": ("autumn", "thirty"),
    "December": ("winter", "thirty one"),
}
SEASONS = ("spring", "summer", "autumn", "winter")
NAMES = (
    *("Anna", "Tom", "Ben", "Sara", "Mary", "John", "Peter", "Lucy", "David", "Emma", "Jack", "Kate", "Paul", "Alice"),
    *("Sam", "Laura", "Mark", "Julia", "George", "Helen", "Henry", "Rose", "Robert", "Susan"),
)

COLOURS = {
    "blue": ("the sky", "the sea", "a blueberry"),
    "green": ("grass", "a frog", "a leaf", "a cucumber", "spinach"),
    "white": ("snow", "milk", "salt", "a swan", "rice", "a polar bear"),
    "black": ("coal", "the night", "a crow", "a panther"),
    "yellow": ("a lemon", "the sun", "a banana", "butter", "corn", "a sunflower"),
    "red": ("a tomato", "blood", "a strawberry", "a cherry", "a fire truck", "a ruby"),
    "orange": ("a carrot", "a pumpkin"),
    "brown": ("wood", "chocolate", "coffee", "toast", "mud"),
    "gray": ("an elephant", "a rain cloud", "ash", "a dolphin"),
    "pink": ("a pig", "a flamingo"),
    "purple": ("a plum", "lavender", "a violet"),
}
MIXED_COLOURS = {
    ("blue", "yellow"): "green",
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "gray",
}

# Animal: size (only the order counts), legs, flies, swims, home, food.
ANIMALS = {
    "ant": (1, 6, False, False, "in the ground", "leaves"),
    "bee": (2, 6, True, False, "in a hive", "honey"),
    "butterfly": (3, 6, True, False, "in the garden", "flowers"),
    "spider": (3, 8, False, False, "in a web", "flies"),
    "mouse": (4, 4, False, True, "in a hole", "cheese"),
    "frog": (5, 4, False, True, "near a pond", "flies"),
    "rabbit": (8, 4, False, False, "in a hole", "carrots"),
    "owl": (7, 2, True, False, "in a tree", "mice"),
    "chicken": (8, 2, False, False, "on a farm", "corn"),
    "duck": (8, 2, True, True, "on a lake", "bread"),
    "cat": (9, 4, False, False, "in a house", "fish"),
    "fox": (10, 4, False, False, "in the forest", "rabbits"),
    "penguin": (10, 2, False, True, "in the south", "fish"),
    "monkey": (11, 2, False, False, "in the jungle", "bananas"),
    "dog": (12, 4, False, True, "in a house", "meat"),
    "goat": (13, 4, False, False, "on a mountain", "grass"),
    "sheep": (14, 4, False, False, "on a farm", "grass"),
    "wolf": (14, 4, False, True, "in the forest", "meat"),
    "pig": (15, 4, False, False, "on a farm", "corn"),
    "lion": (17, 4, False, False, "in the grassland", "meat"),
    "tiger": (18, 4, False, True, "in the jungle", "meat"),
    "bear": (19, 4, False, True, "in the forest", "honey"),
    "cow": (20, 4, False, False, "on a farm", "grass"),
    "horse": (21, 4, False, True, "in a stable", "hay"),
    "camel": (22, 4, False, False, "in the desert", "leaves"),
    "giraffe": (24, 4, False, False, "in the grassland", "leaves"),
    "elephant": (26, 4, False, True, "in the grassland", "leaves"),
    "whale": (30, 0, False, True, "in the sea", "fish"),
}
SOUNDS = {
    "cow": "moo",
    "dog": "woof",
    "cat": "meow",
    "duck": "quack",
    "sheep": "baa",
    "bee": "buzz",
    "lion": "roar",
    "wolf": "howl",
    "mouse": "squeak",
    "owl": "hoot",
}
YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "horse": "foal",
    "sheep": "lamb",
    "pig": "piglet",
    "duck": "duckling",
    "chicken": "chick",
    "bear": "cub",
    "frog": "tadpole",
}

OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("high", "low"), ("open", "closed"), ("happy", "sad")),
    *(("old", "young"), ("light", "dark"), ("wet", "dry"), ("full", "empty"), ("hard", "soft"), ("long", "short")),
    *(("early", "late"), ("rich", "poor"), ("strong", "weak"), ("clean", "dirty"), ("near", "far"), ("left", "right")),
    *(("up", "down"), ("day", "night"), ("good", "bad"), ("loud", "quiet"), ("thick", "thin"), ("sweet", "sour")),
    *(("inside", "outside"), ("first", "last"), ("heavy", "light"), ("begin", "end"), ("push", "pull")),
    *(("buy", "sell"), ("laugh", "cry"), ("true", "false"), ("safe", "dangerous"), ("simple", "difficult")),
    *(("winter", "summer"), ("north", "south"), ("east", "west"), ("war", "peace"), ("always", "never")),
)
CATEGORIES = {
    "a fruit": ("an apple", "a pear", "a banana", "a cherry", "an orange", "a peach", "a plum", "a grape"),
    "a vegetable": ("a carrot", "an onion", "a potato", "a cabbage", "a bean", "a cucumber"),
    "an animal": ("a dog", "a horse", "a tiger", "a camel", "a goat", "a wolf"),
    "a tool": ("a hammer", "a saw", "a shovel", "a drill", "an axe"),
    "a drink": ("tea", "coffee", "milk", "juice", "water", "lemonade"),
    "a piece of clothing": ("a shirt", "a coat", "a hat", "a skirt", "a jacket", "a sock"),
    "a musical instrument": ("a piano", "a guitar", "a violin", "a drum", "a flute", "a trumpet"),
    "a piece of furniture": ("a table", "a chair", "a bed", "a sofa", "a desk"),
    "a vehicle": ("a car", "a bus", "a train", "a truck", "a boat", "a bicycle"),
    "a metal": ("gold", "silver", "iron", "copper"),
    "a flower": ("a rose", "a tulip", "a daisy", "a lily"),
    "a planet": ("Mars", "Venus", "Jupiter", "Saturn"),
}
# Thing: what one does with it.
USES = {
    "a key": "open a door",
    "a knife": "cut bread",
    "a pen": "write a letter",
    "a broom": "sweep the floor",
    "a spoon": "eat soup",
    "a phone": "call a friend",
    "a camera": "take a picture",
    "an umbrella": "stay dry in the rain",
    "a brush": "paint a wall",
    "a needle": "sew a button",
    "a lamp": "light a room",
    "a towel": "dry your hands",
    "a clock": "tell the time",
    "a map": "find the way",
    "an oven": "bake a cake",
    "a shovel": "dig a hole",
    "a hammer": "hit a nail",
    "soap": "wash your hands",
    "a ladder": "climb on the roof",
    "a bridge": "cross a river",
    "a pillow": "rest your head",
    "a cup": "drink tea",
    "a wallet": "carry money",
    "a ticket": "travel by train",
}
JOBS = {
    "baker": "bakes bread",
    "teacher": "teaches children",
    "doctor": "helps sick people",
    "farmer": "grows food",
    "pilot": "flies a plane",
    "cook": "makes dinner",
    "painter": "paints pictures",
    "writer": "writes books",
    "singer": "sings songs",
    "driver": "drives a bus",
    "sailor": "sails a ship",
    "builder": "builds houses",
    "dentist": "looks after teeth",
    "fisherman": "catches fish",
    "gardener": "plants flowers",
    "tailor": "makes clothes",
    "judge": "works in a court",
    "soldier": "serves in the army",
    "dancer": "dances on a stage",
    "barber": "cuts hair",
    "nurse": "cares for patients",
    "waiter": "brings the food",
}
MATERIALS = {
    "a window": "glass",
    "a book": "paper",
    "a coin": "metal",
    "a tire": "rubber",
    "a sweater": "wool",
    "a candle": "wax",
    "a shoe": "leather",
    "a tree": "wood",
    "a bottle": "glass",
    "a snowman": "snow",
    "cheese": "milk",
    "bread": "flour",
    "a castle": "stone",
    "a ring": "gold",
    "a nail": "iron",
    "wine": "grapes",
}
# What one does: where.
PLACES_TO = {
    "sleep": "in a bed",
    "swim": "in a pool",
    "cook": "in the kitchen",
    "buy food": "in a shop",
    "borrow books": "in a library",
    "see a doctor": "in a hospital",
    "watch a film": "in a cinema",
    "catch a train": "at the station",
    "catch a plane": "at the airport",
    "learn to read": "at school",
    "keep milk": "in the fridge",
    "keep money": "in a bank",
    "plant flowers": "in the garden",
    "post a letter": "at the post office",
    "park a car": "in a garage",
    "take a shower": "in the bathroom",
}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "England": "London",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Poland": "Warsaw",
    "Cuba": "Havana",
    "Portugal": "Lisbon",
    "China": "Beijing",
}
SHAPE_SIDES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6}
# Other ways to ask come first to last; those that begin with "~" are never trained on.
FACTS = {
    "Ice is frozen water.": (
        "What is ice?",
        "Tell me what ice is.",
        "What is ice made of?",
        "~Do you know what ice is?",
    ),
    "Water freezes at zero degrees.": ("When does water freeze?", "At how many degrees does water freeze?"),
    "Water boils at one hundred degrees.": ("When does water boil?", "At how many degrees does water boil?"),
    "There are sixty minutes in an hour.": ("How many minutes are in an hour?", "How long is an hour?"),
    "There are sixty seconds in a minute.": ("How many seconds are in a minute?", "How long is a minute?"),
    "There are twenty four hours in a day.": ("How many hours are in a day?", "How long is a day?"),
    "There are seven days in a week.": ("How many days are in a week?", "How long is a week?"),
    "There are twelve months in a year.": ("How many months are in a year?", "How long is a year?"),
    "There are four seasons in a year.": ("How many seasons are in a year?", "How many seasons are there?"),
    "The sun rises in the east.": ("Where does the sun rise?", "In which direction does the sun come up?"),
    "The sun sets in the west.": ("Where does the sun set?", "In which direction does the sun go down?"),
    "The earth goes around the sun.": ("What does the earth go around?", "Does the earth go around the sun?"),
    "The moon goes around the earth.": ("What does the moon go around?", "Does the moon go around the earth?"),
    "The sun is a star.": ("What is the sun?", "Is the sun a star?", "Tell me what the sun is."),
    "You see with your eyes.": ("What do you see with?", "How do people see?", "Which part of the body sees?"),
    "You hear with your ears.": ("What do you hear with?", "How do people hear?", "Which part of the body hears?"),
    "You smell with your nose.": ("What do you smell with?", "How do people smell flowers?"),
    "You taste with your tongue.": ("What do you taste with?", "How do people taste food?"),
    "You walk with your feet.": ("What do you walk with?", "How do people walk?"),
    "You think with your brain.": ("What do you think with?", "How do people think?"),
    "Your heart moves the blood.": ("What does the heart do?", "What moves the blood?", "Tell me what a heart does."),
    "A hand has five fingers.": ("How many fingers has a hand?", "How many fingers are on a hand?"),
    "A bicycle has two wheels.": ("How many wheels has a bicycle?", "How many wheels does a bicycle have?"),
    "A car has four wheels.": ("How many wheels has a car?", "How many wheels does a car have?"),
    "Bees make honey.": ("What do bees make?", "Who makes honey?", "Where does honey come from?"),
    "Cows give milk.": ("What do cows give?", "Which animals give milk?", "Where does milk come from?"),
    "Chickens lay eggs.": ("What do chickens lay?", "Where do eggs come from?", "Which birds lay our eggs?"),
    "Sheep give us wool.": ("What do sheep give us?", "Where does wool come from?"),
    "Rain falls from clouds.": ("Where does rain come from?", "What falls from clouds?"),
    "Plants need light and water.": ("What do plants need?", "What does a plant need to grow?"),
    "Fire is hot and bright.": ("What is fire like?", "How does fire feel?", "Tell me about fire."),
    "A desert is hot and dry.": ("What is a desert like?", "How is it in a desert?", "Tell me about deserts."),
    "The cheetah is the fastest animal on land.": (
        "Which animal runs fastest?",
        "What is the fastest animal on land?",
    ),
    "The blue whale is the largest animal.": ("Which animal is the largest?", "What is the largest animal?"),
    "The giraffe is the tallest animal.": ("Which animal is the tallest?", "What is the tallest animal?"),
    "You can count seven of them in a rainbow.": (
        "How many colours has a rainbow?",
        "How many colours are in a rainbow?",
    ),
    "A piano has black and white keys.": ("What colours are the keys of a piano?", "How do the keys of a piano look?"),
    "A guitar usually has six strings.": ("How many strings has a guitar?", "How many strings are on a guitar?"),
    "A week begins on Monday.": ("On which day does a week begin?", "When does the week begin?"),
    "The first month is January.": ("Which is the first month?", "When does the year begin?"),
    "The last month is December.": ("Which is the last month?", "With which month does the year end?"),
    "You find sand on a beach.": ("What do you find on a beach?", "Where do you find sand?"),
    "Stop at a red light.": ("What do you do at a red light?", "What should I do when the light is red?"),
    "You can go at a green light.": ("What do you do at a green light?", "What should I do when the light is green?"),
}
# Small talk: each answer with the ways to get it.
SMALL_TALK = {
    "Hello, how can I help you?": ("Hello.", "Hi.", "Hey there.", "Hello there.", "Good day to you.", "Hi, computer."),
    "Good morning, I hope you slept well.": ("Good morning.", "Good morning to you.", "Hello and good morning."),
    "Good evening, how was your day?": ("Good evening.", "Good evening to you.", "Hello and good evening."),
    "Good night, sleep well.": ("Good night.", "I am going to bed.", "Good night to you.", "I want to sleep now."),
    "Goodbye, see you soon.": ("Goodbye.", "Bye.", "See you later.", "Goodbye for now.", "I have to leave now."),
    "I am fine, thank you.": ("How are you?", "How are you today?", "How do you feel?", "How is it going?"),
    "You are welcome.": ("Thank you.", "Thanks.", "Thank you very much.", "Thanks a lot.", "Thank you for your help."),
    "I am a small talking computer.": (
        "Who are you?",
        "What are you?",
        "Tell me who you are.",
        "~What kind of thing are you?",
    ),
    "My name is Nano.": ("What is your name?", "Tell me your name.", "Do you have a name?", "~What are you called?"),
    "I can listen, look and answer.": ("What can you do?", "What are you able to do?", "Tell me what you can do."),
    "I was trained on a small computer.": (
        "How were you made?",
        "How did you learn to speak?",
        "Where do you come from?",
    ),
    "No, I am a computer.": ("Are you a person?", "Are you alive?", "Are you human?", "Do you have a body?"),
    "I do not eat, but thank you.": ("Do you want to eat?", "Are you hungry?", "Would you like some cake?"),
    "I never sleep.": ("Do you sleep?", "When do you sleep?", "Are you tired?"),
    "I like questions about numbers.": ("What do you like?", "What is fun for you?", "Which questions do you like?"),
    "I like blue best.": (
        "What is your favourite colour?",
        "Which colour do you like?",
        "Which colour do you like best?",
    ),
    "I like the owl best.": (
        "What is your favourite animal?",
        "Which animal do you like?",
        "Which animal do you like best?",
    ),
    "I like spring best.": (
        "What is your favourite season?",
        "Which season do you like?",
        "Which season do you like best?",
    ),
    "I am happy to hear that.": ("I am happy.", "I feel great.", "Today was a good day.", "I had a nice day."),
    "I am sorry to hear that.": ("I am sad.", "I feel bad.", "Today was a bad day.", "I had a hard day."),
    "Happy birthday to you.": ("Today is my birthday.", "It is my birthday.", "I have my birthday today."),
    "Do not worry, everyone makes mistakes.": ("Sorry.", "I am sorry.", "I made a mistake.", "That was my mistake."),
    "You could eat an apple.": ("I am hungry.", "What can I eat?", "I want to eat something."),
    "You could drink a glass of water.": ("I am thirsty.", "What can I drink?", "I want to drink something."),
    "You should take a rest.": ("I am tired.", "I worked all day.", "What should I do when I am tired?"),
    "Put on a warm coat.": ("I am cold.", "It is cold outside.", "What should I wear in winter?"),
    "Take an umbrella with you.": ("It is raining.", "It will rain today.", "What should I take when it rains?"),
    "Wear a hat in the sun.": ("It is very sunny.", "The sun is strong today.", "What should I wear in the sun?"),
    "You could read a good book.": ("I am bored.", "What can I do today?", "I have nothing to do."),
    "Please see a doctor soon.": ("I am sick.", "I feel ill.", "My head hurts a lot."),
    "Why did the bird sing? It forgot the words.": ("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
    "Of course, what is your question?": ("Can you help me?", "I have a question.", "May I ask you something?"),
    "I do not know that yet.": ("What will happen tomorrow?", "Who will win the game?", "What am I thinking of?"),
    "Yes, I can hear you well.": ("Can you hear me?", "Do you hear me?", "Is this thing on?"),
    "Yes, I can look at a picture.": ("Can you see?", "Can you look at pictures?", "Do you understand pictures?"),
    "I speak English.": ("Which language do you speak?", "Do you speak English?", "What languages do you know?"),
}

# For conversations made of parts: what lies somewhere, what somebody has, likes or does.
OBJECTS = (
    *(
        "ball",
        "book",
        "cup",
        "hat",
        "key",
        "lamp",
        "letter",
        "phone",
        "pencil",
        "plate",
        "shoe",
        "spoon",
        "box",
        "bag",
    ),
    *("coat", "clock", "bottle", "candle", "camera", "basket", "blanket", "guitar", "map", "ticket"),
)
PREPOSITIONS = ("on", "under", "behind", "near", "beside", "in front of")
FURNITURE = (
    *("table", "chair", "bed", "sofa", "desk", "door", "window", "fridge", "piano", "shelf", "tree", "car", "mirror"),
    *("fireplace", "cupboard"),
)
TINTS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")
FOODS = (
    *("apples", "bread", "butter", "cake", "cheese", "chocolate", "coffee", "eggs", "fish", "honey", "ice cream"),
    *("lemons", "milk", "oranges", "pizza", "potatoes", "rice", "salad", "soup", "sugar", "tea", "tomatoes", "water"),
)
DESTINATIONS = (
    *("park", "school", "market", "beach", "library", "river", "station", "theater", "museum", "garden", "village"),
    *("forest", "city", "church", "lake", "hospital"),
)
ERRANDS = (
    *("call your mother", "buy some milk", "feed the cat", "water the flowers", "wash the car", "close the window"),
    *("write a letter", "cook dinner", "clean the kitchen", "pay the bill", "walk the dog", "read the news"),
    *("take your medicine", "bake a cake", "open the door", "go to bed"),
)
COUNTED = (
    *(("apple", "apples"), ("book", "books"), ("coin", "coins"), ("flower", "flowers"), ("egg", "eggs")),
    *(("friend", "friends"), ("pencil", "pencils"), ("cat", "cats"), ("stamp", "stamps"), ("button", "buttons")),
    *(("orange", "oranges"), ("stone", "stones"), ("cup", "cups"), ("letter", "letters"), ("balloon", "balloons")),
    *(("ticket", "tickets"), ("candle", "candles"), ("cookie", "cookies"), ("ring", "rings"), ("shell", "shells")),
)

# Pictures.
SHAPES = ("circle", "square", "triangle", "star", "heart")
SHAPE_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}

# "Repeat after me": a larger vocabulary, dealt out evenly. Words between spaces.
REPEAT_PEOPLE = """
    actor artist aunt author baby baker boss boy brother captain child clerk clown coach cousin customer dancer
    daughter dentist doctor driver engineer expert farmer father fisherman friend gardener girl grandmother guard
    guest guide hero hunter husband judge king lady lawyer leader man manager mayor mother musician neighbor nurse
    officer owner painter parent partner pilot player poet policeman president priest prince princess prisoner
    professor queen reporter sailor scientist secretary servant singer sister soldier son stranger student tailor
    teacher tourist traveler uncle visitor waiter wife winner witness woman worker writer
"""
REPEAT_ANIMALS = """
    ant bear bee bird butterfly camel cat chicken cow crow deer dog dolphin donkey duck eagle elephant fish fox frog
    giraffe goat goose hen horse kitten lamb lion lizard monkey mouse owl parrot penguin pig pigeon pony puppy
    rabbit rat shark sheep snake spider swan tiger turkey turtle whale wolf
"""
REPEAT_THINGS = """
    album anchor apple apron arrow axe bacon bag bagel ball balloon banana bandage barrel barrier basket battery
    bean beard beef bell belt bench bill biscuit blanket board boat bone book boot bottle bowl box bracelet branch
    bread brick bridge broom brush bubble bucket bulb bus button cabbage cabinet cable cage cake calendar camera
    candle cannon canoe canvas cap card carpet carrot cart chain chair cheese chicken circle clock cloth club coat
    coin collar column comb compass computer contract cookie copper costume cotton couch counter cover cradle cream
    crown crystal cup curtain curve cushion dagger desk diamond diary dictionary dinner dish doll dollar door drawer
    dress drum egg envelope eraser fabric fan faucet feast feather fence film finger fireplace flag flame flashlight
    flour flower flute football fork fountain frame freezer fruit furniture garlic gate gift glass glove gold grain
    grape grass gravel guitar hammer hammock handbag handle hat headline helicopter helmet honey hook hose
    instrument iron island jacket jar jewel jewelry juice kettle key keyboard knife label lace ladder lamp lantern
    lawn leaf lemon lens letter lettuce lever light lipstick lock log luggage machine magazine magnet map marble
    mask match mattress meal medal medicine menu message metal microphone microscope mirror mixture money motor
    motorcycle mug mushroom nail napkin necklace needle net newspaper nickel noodle note notebook novel nut onion
    orange ornament outfit oven package paddle page paint painting pan paper parcel passport pasta peach peanut pear
    pearl pebble pedal pencil penny pepper perfume phone photograph piano picnic picture pie pill pillow pipe
    pitcher pizza plank plant plastic plate plow pocket poem pole postage postcard pot potato powder prescription
    present prize product pump pumpkin purse puzzle radio raft rail raincoat rake razor recipe record recording
    ribbon ring robe robot rocket roof rope rose rug ruler sack saddle sail salad sandwich sauce saucer scarf
    scissors screen script sculpture seat seed shade sheet shelf shell shelter shield shirt shoe shovel shutter sign
    silk silver skate sketch skirt sled soap sock sofa song soup sponge spoon squash stain staircase stamp statue
    steel stem stereo stick stone stool stove strap straw stream string sugar suit sweater sword symbol syrup table
    tank tape taxi tea telephone telescope television tent thread throne ticket tie tile timer toast toilet tomato
    tool torch towel tower toy train tray treasure tree trophy trousers truck trumpet tub tube turnip typewriter
    umbrella uniform van vase vegetable veil vest vinegar violin wagon wallet watch wax web wheat wheel whistle
    window wing wire wood wool wreath wrench yarn zipper
"""
REPEAT_PLACES = """
    airport attic avenue bakery balcony bank barn basement bathroom bay beach bedroom camp castle cave cellar church
    cinema city classroom cliff club coast college corner cottage country court desert dock factory farm field
    forest garage garden hall harbor highway hill hospital hotel hut island jungle kitchen laboratory lake library
    lobby market meadow mine mountain museum nest office orchard palace park path pharmacy playground pond pool port
    prison restaurant river road ruins school shop shore stadium station store street studio swamp temple theater
    town tunnel university valley village warehouse yard zoo
"""
REPEAT_ADJECTIVES = """
    able active ancient angry anxious bitter bold brave bright brilliant broad broken calm careful charming cheap
    clean clever cold comfortable common cool crazy curious dangerous dark deep delicate delicious different dirty
    distant dry dusty eager early easy elegant empty enormous excellent expensive fair famous fancy fantastic fast
    favorite fierce final fine flat foreign fragile free fresh friendly frozen full funny gentle giant glad golden
    good graceful grand great greedy handsome happy hard healthy heavy helpful hidden high hollow honest hot huge
    hungry important innocent interesting jealous joyful kind large late lazy light little local lonely long loose
    loud lovely lucky magic massive mighty modern modest muddy mysterious narrow nasty natural neat nervous new nice
    noble noisy odd old open ordinary painful pale patient peaceful perfect plain playful pleasant polite poor
    popular powerful precious pretty private proud public pure quick quiet rapid rare ready real rich ripe rough
    round royal rude rusty sacred sad safe secret selfish serious shallow sharp shiny short shy silent silly simple
    sleepy slim slow small smart smooth soft solid sour special splendid square steep sticky stiff straight strange
    strict strong sudden sunny sweet tall tame tender terrible thick thin thirsty tidy tiny tired tough unusual
    useful valuable vast warm weak wealthy wet wide wild wise wonderful wooden worried young
"""
# Past tense, with something or somebody as their object.
REPEAT_DID_THING = """
    admired borrowed bought broke brought built buried burned carried caught checked chose cleaned collected counted
    covered cut decorated delivered described designed destroyed discovered drew dropped emptied examined exchanged
    filled finished fixed folded forgot found gave grabbed guarded held hid ignored inspected invented kept kicked
    lifted liked located lost loved made measured mentioned moved needed noticed offered opened ordered packed
    painted placed polished prepared protected pulled pushed raised received recognized removed repaired replaced
    returned saved selected shared showed signed sold stole stored studied threw took touched traded turned used
    wanted washed watched weighed wrapped
"""
REPEAT_DID_SOMEONE = """
    advised answered asked believed called chased defended followed forgave greeted guided heard helped hugged
    invited joined met missed obeyed praised punished questioned reminded rescued respected saw scared served
    surprised taught thanked trusted visited warned welcomed
"""
REPEAT_ADVERBS = """
    again alone already badly bravely briefly calmly carefully cheerfully clearly daily deeply eagerly early easily
    finally firmly gently gladly happily honestly instead kindly lately loudly nearby nervously nicely often
    patiently perfectly politely proudly quickly quietly rarely really sadly safely seriously silently simply slowly
    softly somehow soon suddenly surely sweetly today together tonight twice usually warmly yesterday
"""
REPEAT_WENT = """
    arrived cried danced disappeared drove fell flew hurried jumped laughed lived marched moved played prayed ran
    rested returned rode rolled rushed sang sat shouted slept smiled stayed stood stopped swam talked traveled
    waited walked wandered worked
"""

# Wordings that are trained on and never held out: few ways to ask do not teach what a new one means.
MORE_WAYS = {
    "plus": (
        "Can you add {a} and {b}?",
        "Please tell me {a} plus {b}.",
        "What does {a} plus {b} make?",
        "{a} and {b} make what?",
    ),
    "minus": (
        "Can you take {b} from {a}?",
        "Please tell me {a} minus {b}.",
        "What does {a} minus {b} make?",
        "What remains when you take {b} from {a}?",
    ),
    "times": (
        "Can you tell me {a} times {b}?",
        "Please tell me {a} times {b}.",
        "What does {a} times {b} make?",
        "{b} times {a} makes what?",
    ),
    "larger": (
        "Which is larger, {b} or {a}?",
        "Which number is larger, {b} or {a}?",
        "Tell me which is larger, {a} or {b}.",
        "Which of the two is larger, {a} or {b}?",
        "Which of the two is larger, {b} or {a}?",
    ),
    "next": (
        "Name the number after {x}.",
        "What is the number after {x}?",
        "Please tell me what comes after {x}.",
        "Which number is after {x}?",
    ),
    "previous": (
        "Name the number before {x}.",
        "Please tell me what comes before {x}.",
        "Which number is before {x}?",
    ),
    "count": ("Count up from {a} to {b}.", "Now count from {a} to {b}.", "Tell me the numbers from {a} to {b}."),
    "count down": (
        "Please count down from {b} to {a}.",
        "Can you count from {b} down to {a}?",
        "Now count from {b} to {a}.",
    ),
    "get": ("I had {a} {x} and got {b} more. How many do I have?",),
    "lose": ("I had {a} {x} and gave away {b}. How many are left?",),
    "day after": ("Tell me the day after {x}.", "Name the day after {x}.", "What is the day after {x}?"),
    "day before": ("Name the day before {x}.", "What is the day before {x}?", "Which day is before {x}?"),
    "tomorrow": ("Today is {x}. Tell me what tomorrow is.", "Tell me what tomorrow is if today is {x}."),
    "yesterday": ("It is {x}. What was yesterday?", "Today is {x}. Tell me what yesterday was."),
    "day": ("Tell me the {x} day of the week.", "What is the {x} day called?", "Name the {x} day."),
    "month after": ("Tell me the month after {x}.", "Name the month after {x}.", "What is the month after {x}?"),
    "month before": ("Name the month before {x}.", "What is the month before {x}?", "Which month is before {x}?"),
    "days": (
        "Tell me how many days {x} has.",
        "How many days are there in {x}?",
        "Tell me how many days are in {x}.",
        "How many days long is {x}?",
    ),
    "season": ("Tell me which season {x} is in.", "What is the season of {x}?", "Name the season of {x}."),
    "month": ("Tell me the {x} month of the year.", "What is the {x} month called?", "Name the {x} month."),
    "season after": ("Tell me the season after {x}.", "What is the season after {x}?", "Name the season after {x}."),
    "later": (
        "It is {a} o'clock. What time will it be in {b}?",
        "It is {a} o'clock now. Tell me the time in {b}.",
        "What time is it in {b} if it is {a} o'clock now?",
    ),
    "ago": (
        "It is {a} o'clock. Tell me the time {b} ago.",
        "It is {a} o'clock now. What time was it {b} ago?",
        "What time was it {b} ago if it is {a} o'clock now?",
    ),
    "has": (
        "{n} has a {c} {x}. Tell me who has a {x}.",
        "{n} found a {c} {x}. Tell me what {n} found.",
        "I gave {n} a {c} {x}. Tell me what {n} has.",
    ),
}
