"""The small world of the embedded model: names, animals, things, places, and what is true of them."""

from __future__ import annotations

GIRLS = """Lily Mia Anna Sara Emma Lucy Zoe Ruby Nora Ella Rosa Ivy Clara Amy Maya Hana Tina Eva Molly Daisy Jane
Kate Lena Nina Olive Paula Sophie Tess Vera Wendy Alma Beth Cora Dina Fay Gina Holly Iris June Kim""".split()
BOYS = """Tom Ben Max Sam Jack Leo Tim Finn Noah Adam Luke Owen Hugo Oscar Peter Paul Mark Dan Eli Ravi
Ali Bill Carl David Eric Fred Gus Henry Ian Jim Karl Liam Milo Ned Otto Pat Rob Sean Theo Will""".split()
PET_NAMES = """Pip Bobo Coco Momo Fluffy Nibbles Sunny Tiny Patch Spot Biscuit Pepper Ginger Bramble Button
Maple Hazel Rusty Dusty Misty Pebble Clover Berry Acorn Waffle Muffin Snowy Sooty Tumble Whisk""".split()

# animal | baby | sound | home | food | place | legs | body | can
_ANIMALS = """
dog|puppy|woof|kennel|meat|garden|four|fur|run
cat|kitten|meow|house|fish|garden|four|fur|climb
cow|calf|moo|barn|grass|farm|four|hair|give milk
horse|foal|neigh|stable|hay|farm|four|hair|gallop
pig|piglet|oink|sty|corn|farm|four|skin|roll in mud
sheep|lamb|baa|field|grass|farm|four|wool|give wool
goat|kid|maa|barn|leaves|hill|four|hair|climb rocks
duck|duckling|quack|pond|bread|pond|two|feathers|swim
hen|chick|cluck|coop|seeds|farm|two|feathers|lay eggs
goose|gosling|honk|pond|grass|lake|two|feathers|fly
mouse|pup|squeak|hole|cheese|barn|four|fur|hide
rabbit|kit|no sound|burrow|carrots|meadow|four|fur|hop
fox|cub|yip|den|berries|forest|four|fur|run
bear|cub|growl|cave|honey|forest|four|fur|climb
wolf|pup|howl|den|meat|forest|four|fur|run
deer|fawn|no sound|wood|leaves|forest|four|hair|jump
owl|owlet|hoot|tree|mice|forest|two|feathers|see at night
squirrel|kit|chatter|tree|nuts|park|four|fur|climb
hedgehog|hoglet|sniff|bush|beetles|garden|four|spines|roll into a ball
frog|tadpole|croak|pond|flies|pond|four|smooth skin|jump
turtle|hatchling|no sound|shell|plants|lake|four|a shell|swim
bee|larva|buzz|hive|nectar|garden|six|fuzz|make honey
ant|larva|no sound|nest|crumbs|garden|six|a hard skin|carry things
butterfly|caterpillar|no sound|garden|nectar|meadow|six|bright wings|fly
spider|spiderling|no sound|web|flies|barn|eight|hair|make a web
snail|hatchling|no sound|shell|leaves|garden|no|a shell|carry its home
fish|fry|no sound|sea|plants|sea|no|scales|swim
whale|calf|song|sea|small fish|sea|no|smooth skin|dive
dolphin|calf|click|sea|fish|sea|no|smooth skin|jump out of the water
crab|larva|no sound|sand|plants|beach|ten|a shell|walk sideways
lion|cub|roar|grassland|meat|grassland|four|fur|roar
tiger|cub|roar|jungle|meat|jungle|four|striped fur|swim
elephant|calf|trumpet|grassland|leaves|grassland|four|gray skin|drink with its trunk
monkey|infant|chatter|tree|bananas|jungle|four|fur|swing
giraffe|calf|hum|grassland|leaves|grassland|four|spots|reach high leaves
zebra|foal|bark|grassland|grass|grassland|four|stripes|run
snake|snakelet|hiss|hole|mice|jungle|no|scales|slide
parrot|chick|squawk|tree|seeds|jungle|two|feathers|copy sounds
penguin|chick|bray|ice|fish|sea|two|feathers|swim
camel|calf|grunt|desert|dry grass|desert|four|hair|walk far without water
kangaroo|joey|no sound|grassland|grass|grassland|two|fur|hop
bat|pup|squeak|cave|insects|cave|two|fur|fly at night
crow|chick|caw|nest|seeds|field|two|feathers|fly
robin|chick|tweet|nest|worms|garden|two|feathers|sing
swan|cygnet|hiss|lake|plants|lake|two|feathers|swim
donkey|foal|bray|stable|hay|farm|four|hair|carry bags
panda|cub|squeak|forest|bamboo|forest|four|fur|climb
koala|joey|grunt|tree|leaves|forest|four|fur|sleep all day
seal|pup|bark|ice|fish|sea|no|fur|swim
beaver|kit|no sound|lodge|wood|river|four|fur|build a dam
"""
ANIMALS: dict[str, dict[str, str]] = {
    row[0]: dict(zip(("baby", "sound", "home", "food", "place", "legs", "body", "can"), row[1:], strict=True))
    for row in (line.split("|") for line in _ANIMALS.split("\n") if line)
}
HEROES = """dog cat cow horse pig sheep goat duck hen mouse rabbit fox bear wolf deer owl squirrel hedgehog frog turtle
bee ant butterfly snail fish whale dolphin crab lion tiger elephant monkey giraffe zebra parrot penguin camel kangaroo
crow robin swan donkey panda koala seal beaver""".split()

# thing | what it is for | made of
_THINGS = """
ball|playing|rubber
kite|flying in the wind|paper
book|reading|paper
key|opening a door|metal
lamp|giving light|glass
box|keeping things in|wood
drum|making music|wood
bell|ringing|metal
boat|sailing on water|wood
cup|drinking|clay
hat|keeping your head warm|cloth
coat|keeping you warm|wool
scarf|keeping your neck warm|wool
shoe|walking|leather
spoon|eating soup|metal
bowl|holding soup|clay
brush|cleaning|wood
bed|sleeping|wood
chair|sitting|wood
table|eating at|wood
clock|telling the time|metal
pencil|writing|wood
bag|carrying things|cloth
rope|pulling and tying|plant fibers
map|finding the way|paper
flute|making music|wood
mirror|seeing yourself|glass
umbrella|keeping the rain off|cloth
ladder|climbing up|wood
bucket|carrying water|metal
blanket|keeping warm in bed|wool
candle|giving light|wax
basket|carrying fruit|straw
doll|playing|cloth
puzzle|thinking and playing|wood
wagon|carrying heavy things|wood
ring|wearing on a finger|gold
coin|buying things|metal
bike|riding|metal
sled|sliding on snow|wood
shovel|digging|metal
hammer|hitting nails|metal
needle|sewing|metal
broom|sweeping the floor|straw
window|letting in light|glass
pillow|resting your head|cloth and feathers
whistle|making a loud sound|metal
compass|showing where north is|metal
lantern|giving light in the dark|glass
"""
THINGS: dict[str, tuple[str, str]] = {
    a: (b, c) for a, b, c in (line.split("|") for line in _THINGS.split("\n") if line)
}
TOYS = """ball kite book key lamp box drum bell boat cup hat scarf bag rope map flute mirror umbrella bucket blanket
candle basket doll puzzle wagon ring coin sled shovel whistle compass lantern""".split()

PLACES = {
    "forest": "in the forest",
    "garden": "in the garden",
    "park": "in the park",
    "beach": "on the beach",
    "hill": "on the hill",
    "farm": "on the farm",
    "village": "in the village",
    "river": "by the river",
    "lake": "by the lake",
    "meadow": "in the meadow",
    "cave": "in the cave",
    "mountain": "on the mountain",
    "school": "at school",
    "market": "at the market",
    "barn": "in the barn",
    "pond": "by the pond",
    "island": "on the island",
    "castle": "in the castle",
    "tower": "in the tower",
    "desert": "in the desert",
    "jungle": "in the jungle",
    "bridge": "on the bridge",
    "kitchen": "in the kitchen",
    "library": "in the library",
    "sea": "by the sea",
    "town": "in the town",
    "field": "in the field",
    "bakery": "in the bakery",
}
FOODS = """apple pear plum cake pie cookie sandwich carrot banana orange peach pancake muffin tomato potato
melon bun strawberry""".split()
COLORS = "red blue green yellow white black brown purple orange pink gray golden silver".split()
GOOD = "kind brave clever gentle cheerful honest patient curious friendly careful".split()
SMALL = "little small young tiny".split()
WEATHER = ["sunny", "windy", "rainy", "snowy", "cloudy", "foggy", "cold", "warm"]
JOBS = {
    "baker": "bakes bread",
    "doctor": "helps sick people",
    "teacher": "teaches children",
    "farmer": "grows food",
    "fisherman": "catches fish",
    "pilot": "flies a plane",
    "sailor": "sails a ship",
    "cook": "cooks food",
    "tailor": "makes clothes",
    "carpenter": "makes things from wood",
    "firefighter": "puts out fires",
    "nurse": "cares for sick people",
    "painter": "paints pictures",
    "singer": "sings songs",
    "gardener": "cares for plants",
    "dentist": "cares for teeth",
    "vet": "helps sick animals",
    "librarian": "cares for books",
    "driver": "drives a bus",
    "writer": "writes books",
    "miner": "digs in the ground",
    "judge": "decides in a court",
    "police officer": "keeps people safe",
    "mail carrier": "brings letters",
}
OPPOSITES = """big small|hot cold|up down|day night|happy sad|fast slow|old young|wet dry|hard soft|open closed|full empty
|long short|high low|light dark|loud quiet|clean dirty|early late|rich poor|strong weak|thick thin|near far|left right
|black white|sweet sour|good bad|new old|first last|begin end|love hate|give take|push pull|front back|inside outside
|above below|awake asleep|smooth rough|sharp dull|brave afraid|win lose|come go|buy sell|wide narrow|deep shallow
|heavy light|true false|same different|always never|many few|summer winter|north south|east west"""
OPPOSITE_PAIRS = [tuple(pair.split()) for pair in OPPOSITES.replace("\n", "").split("|")]
CAPITALS = dict(
    pair.split(":")
    for pair in """France:Paris|Spain:Madrid|Italy:Rome|Germany:Berlin|England:London|Japan:Tokyo|China:Beijing|Egypt:Cairo
|Greece:Athens|Portugal:Lisbon|Ireland:Dublin|Norway:Oslo|Sweden:Stockholm|Poland:Warsaw|Austria:Vienna|Russia:Moscow
|Canada:Ottawa|Cuba:Havana|Peru:Lima|Chile:Santiago|Kenya:Nairobi|India:New Delhi|Denmark:Copenhagen|Finland:Helsinki
|Hungary:Budapest|Turkey:Ankara|Mexico:Mexico City|Thailand:Bangkok|Vietnam:Hanoi|Belgium:Brussels""".replace(
        "\n", ""
    ).split("|")
)
UNTAUGHT_COUNTRIES = """Bolivia Ghana Nepal Estonia Malta Zambia Fiji Panama Angola Jordan Qatar Mongolia Uruguay Rwanda
Iceland Latvia Cyprus Senegal Tunisia Laos Togo Oman Benin Chad Mali Niger Gabon Serbia Kuwait Bhutan""".split()
COLOR_OF = dict(
    pair.split(":")
    for pair in """the sky:blue|grass:green|snow:white|a banana:yellow|a tomato:red|an orange:orange|coal:black|milk:white
|the sun:yellow|a strawberry:red|a carrot:orange|a lemon:yellow|blood:red|a leaf:green|chocolate:brown|an elephant:gray
|a frog:green|a polar bear:white|a crow:black|a swan:white|a cherry:red|a pea:green|a plum:purple|honey:golden
|salt:white|butter:yellow|a flamingo:pink|a fire engine:red|the sea:blue|wood:brown|a cucumber:green|rice:white
|a pumpkin:orange|a raven:black|gold:yellow|a rose:red""".replace("\n", "").split("|")
)
FACTS = [
    tuple(pair.split("|"))
    for pair in """How many days are in a week?|There are seven days in a week.
How many months are in a year?|There are twelve months in a year.
How many hours are in a day?|There are twenty-four hours in a day.
How many minutes are in an hour?|There are sixty minutes in an hour.
How many seconds are in a minute?|There are sixty seconds in a minute.
How many days are in a year?|Most years have 365 days.
How many seasons are there?|There are four seasons: spring, summer, autumn and winter.
What are the four seasons?|The four seasons are spring, summer, autumn and winter.
How many legs does a spider have?|A spider has eight legs.
How many wheels does a bike have?|A bike has two wheels.
How many wheels does a car have?|A car has four wheels.
How many fingers are on one hand?|There are five fingers on one hand.
How many eyes do you see with?|People see with two eyes.
How many sides does a triangle have?|A triangle has three sides.
How many sides does a square have?|A square has four sides.
How many letters are in the alphabet?|There are twenty-six letters in the English alphabet.
What is the biggest animal?|The blue whale is the biggest animal.
What is the tallest animal?|The giraffe is the tallest animal.
What is the fastest land animal?|The cheetah is the fastest land animal.
What is the largest planet?|Jupiter is the largest planet.
Which planet do we live on?|We live on the planet Earth.
What is the closest star?|The sun is the closest star to us.
What is the moon?|The moon is a big ball of rock that goes around the Earth.
What is the sun?|The sun is a star. It gives us light and warmth.
What is rain?|Rain is water that falls from clouds.
What is snow?|Snow is frozen water that falls from clouds.
What is ice?|Ice is frozen water.
What is steam?|Steam is water that has become very hot.
What is wind?|Wind is moving air.
What is a cloud?|A cloud is many tiny drops of water in the air.
What is a river?|A river is a long stream of water that flows to the sea.
What is a lake?|A lake is a large body of water with land all around it.
What is an island?|An island is land with water all around it.
What is a mountain?|A mountain is very high land.
What is a desert?|A desert is a dry place with very little rain.
What is a forest?|A forest is a place with many trees.
What is a seed?|A seed is a small thing that can grow into a plant.
What do plants need?|Plants need water, light and soil.
What do bees make?|Bees make honey.
What do cows give us?|Cows give us milk.
What do hens lay?|Hens lay eggs.
What do we get from sheep?|We get wool from sheep.
What is bread made of?|Bread is made of flour, water and a little salt.
What is cheese made of?|Cheese is made of milk.
What is paper made of?|Paper is made of wood.
What is glass made of?|Glass is made of sand.
What is a rainbow?|A rainbow is light that shines through drops of rain in many colors.
When do we see a rainbow?|We see a rainbow when the sun shines through the rain.
When does the sun rise?|The sun rises in the morning.
When does the sun set?|The sun sets in the evening.
Where does the sun rise?|The sun rises in the east.
Where does the sun set?|The sun sets in the west.
What comes after Monday?|Tuesday comes after Monday.
What comes after Tuesday?|Wednesday comes after Tuesday.
What comes after Wednesday?|Thursday comes after Wednesday.
What comes after Thursday?|Friday comes after Thursday.
What comes after Friday?|Saturday comes after Friday.
What comes after Saturday?|Sunday comes after Saturday.
What comes after Sunday?|Monday comes after Sunday.
What is the first month of the year?|January is the first month of the year.
What is the last month of the year?|December is the last month of the year.
What comes after spring?|Summer comes after spring.
What comes after summer?|Autumn comes after summer.
What comes after autumn?|Winter comes after autumn.
What comes after winter?|Spring comes after winter.
What do you use to smell?|People smell with the nose.
What do people see with?|People see with their eyes.
What do people hear with?|People hear with their ears.
Why do we sleep?|Sleep lets the body and the mind rest.
Why do we brush our teeth?|We brush our teeth to keep them clean and strong.
Why do birds have wings?|Birds have wings so that they can fly.
Why do leaves fall?|Many trees drop their leaves in autumn to save water in winter.
Why is it dark at night?|At night our side of the Earth is turned away from the sun.
Why does ice melt?|Ice melts when it gets warm.
Why do we wear coats?|We wear coats to stay warm.
What is a friend?|A friend is someone who likes you and helps you.
What is a library?|A library is a place with many books that you can borrow.
What is a hospital?|A hospital is a place where sick people get help.
What is a school?|A school is a place where people learn.
What is a market?|A market is a place where people buy and sell things.
What is a computer?|A computer is a machine that follows instructions.
What is a program?|A program is a list of instructions for a computer.
What is music?|Music is sound that is put together in a pleasing way.
What is a story?|A story tells what happens to someone, from a beginning to an end.
What is a poem?|A poem is a short text that plays with words and sounds.
What is a dictionary?|A dictionary is a book that tells what words mean.
What is a volcano?|A volcano is a mountain that can throw out hot rock.
What is gravity?|Gravity pulls things down to the ground.
What is the ocean?|The ocean is the very big salt water that covers most of the Earth.
Is sea water salty?|Yes, sea water is salty.
Is the sun hot?|Yes, the sun is very hot.
Is ice cold?|Yes, ice is cold.
Can fish swim?|Yes, fish can swim.
Can penguins fly?|No, penguins can not fly, but they swim very well.
Can a stone swim?|No, a stone sinks in water.
Is a whale a fish?|No, a whale is not a fish. It breathes air.
Is a spider an insect?|No, a spider is not an insect. It has eight legs.
Is a tomato a fruit?|Yes, a tomato is a fruit.
Do trees have leaves?|Yes, most trees have leaves.
Do snakes have legs?|No, snakes do not have legs.""".split("\n")
]
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""".split()


def article(word: str) -> str:
    """`an apple`, `a pear`."""
    return ("an " if (word[0] in "aeiou" and not word.startswith("uni")) or word == "honest" else "a ") + word


def cap(text: str) -> str:
    """A capital at the start, the rest as it is."""
    return text[0].upper() + text[1:]
