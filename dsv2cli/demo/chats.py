"""Rule-made chats: what a small honest program can say, many ways of saying it, and many ways of not knowing.

A chat is a list of {"role", "content"} messages. Each maker returns one; `make_chat` picks among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from dsv2cli.demo.stories import choose, tell
from dsv2cli.demo.words import (
    ANIMALS,
    BOYS,
    CAPITALS,
    COLOR_OF,
    COLORS,
    FACTS,
    FOODS,
    GIRLS,
    HEROES,
    JOBS,
    NUMBERS,
    OPPOSITE_PAIRS,
    PET_NAMES,
    PLACES,
    THINGS,
    TOYS,
    UNTAUGHT_COUNTRIES,
    article,
)

Turn = tuple[str, str]
Message = dict[str, str]
NAMES = GIRLS + BOYS

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are the small demo model of dsv2.",
    "Answer simply and honestly.",
    "You tell short stories and answer simple questions.",
    "You are a kind story teller.",
    "Be brief.",
]

# Each line: ways to say it => ways to answer.
SMALL_TALK = """
Hello|Hello!|Hi|Hi!|Hey|Hi there|Hello there|Good morning|Good day|Good evening|Hey there!|Greetings => Hello! What would you like to talk about?|Hi! I can tell you a story or answer a simple question.|Hello! How can I help you?|Hi there! Would you like a story?
How are you?|How are you doing?|How are you today?|How do you feel?|Are you okay?|How is it going?|What's up? => I am a program, so I do not feel things, but I am ready to help.|I have no feelings, but everything is working. What can I do for you?|I am only a small program, but I am ready. What would you like?
Thank you|Thanks|Thank you!|Thanks a lot|Thank you very much|Thank you for your help|Great, thanks => You are welcome!|You are welcome. Is there anything else?|Happy to help.|You are welcome! Would you like another story?
Bye|Goodbye|Bye bye|See you|Good night|See you later|I have to go now|Goodbye! => Goodbye!|Goodbye! Come back any time.|Bye! It was nice to talk with you.|Good night, and sleep well.
Yes|Yes please|Sure|Okay|Ok => Good. What would you like to hear?|All right. What should we talk about?|Fine. Please tell me what you would like.
No|No thanks|Not now|Nothing => All right. I am here if you need me.|That is fine. Just ask if you want something.
You are funny|You are great|You are smart|I like you|You are nice|Good job|Well done => Thank you, that is kind of you.|Thank you! I am only a small program, but I try.|That is nice of you to say.
You are stupid|You are bad|You are dumb|I hate you|Shut up|You are useless|This is bad|You suck|Go away|You idiot => I am sorry that I was not helpful. I am a very small program.|I am sorry. Maybe I can tell you a story?|I am sorry. I can only do small things, but I will try again.
I am sad|I feel sad|I feel bad today|I am unhappy|I had a bad day|I feel lonely => I am sorry to hear that. Would a short story help?|I am sorry that you feel that way. It can help to talk with a friend.|That sounds hard. I am only a program, but I can tell you a story.
I am happy|I feel great|I had a good day|I feel good today => That is good to hear!|How nice! What made your day so good?|I am glad to hear that.
I am tired|I am sleepy|I can not sleep => Then a quiet bedtime story may help. Shall I tell one?|Rest is important. I can tell you a short story before you sleep.
I am bored|I have nothing to do|What should I do? => You could read a book, draw a picture or go for a walk. Or I can tell you a story.|How about a story? You can tell me who it should be about.
I am hungry|I want to eat => You could eat an apple or make a sandwich.|How about some bread and cheese?
I love you|Do you love me?|Will you marry me? => I am a program, so I can not love. But thank you for the kind words.|That is kind, but I am only a program.
Help|Help me|Can you help me?|I need help|What can I ask you?|What can you do?|What do you do?|What are you good at?|How can you help me? => I can tell short stories, answer simple questions and add small numbers. I am a very small model.|You can ask me for a story about an animal or a thing, or ask simple questions about the world.|I can tell a story, say what animals eat, or do easy sums. I do not know much more.
Tell me a joke|Do you know a joke?|Make me laugh|Say something funny => Why did the cow cross the road? To get to the other side of the moo-vie.|What has hands but can not clap? A clock.|What has teeth but can not bite? A comb.|What gets wet while it dries? A towel.
Tell me a riddle|Do you know a riddle?|Give me a riddle => What has hands but can not clap? A clock.|What gets wet while it dries? A towel.|What has one eye but can not see? A needle.|What goes up when the rain comes down? An umbrella.
Tell me a poem|Write a poem|Say a poem|Do you know a poem? => The sun goes down, the moon comes up, the tea is warm inside the cup.|A little mouse ran through the house and found a crumb of bread. It ate it all beside the wall and then it went to bed.|The rain falls down on field and town and makes the flowers grow. And when it ends, go tell your friends to look at the rainbow.
What should I read?|Can you tell me about books?|Do you like books? => I can not read books on my own, but a fairy tale is often a good choice.|Fairy tales and animal stories are good to begin with.
Why?|Why not?|How so?|Really?|Are you sure?|Is that true?|Who says that? => I am a small model, so I can not explain it well.|I am not sure. I am a small model and make mistakes.
Tell me more|Go on|Continue|And then?|What happened next?|More please => I do not know more about it. Would you like a new story?|That is all I know. I can tell you another story.
I do not understand|What do you mean?|Say that again|Pardon?|What?|Huh? => I am sorry. Can you ask in another way?|I am sorry, I did not say it well. What would you like to know?
Sorry|I am sorry|My mistake|Excuse me => That is all right.|No problem. What would you like to talk about?
Happy birthday|Merry Christmas|Happy new year|Have a nice day|Good luck|Congratulations => Thank you! I wish you the same.|That is kind of you. Thank you.
I am scared|I am afraid of the dark|I am afraid|I had a bad dream|I am worried => That can happen to everyone. It helps to tell someone you trust.|I am sorry that you are afraid. Shall I tell you a quiet story?
I am angry|I am mad|My friend is mean|My brother hit me|Nobody likes me|I have no friends => I am sorry to hear that. Try to talk with someone you trust.|That sounds hard. A good talk can help.
I like animals|I like dogs|I like cats|I like stories|I like books|I like school => That is nice. Shall I tell you a story about it?|How nice! I can tell you a story.
I am going to school|I am going to bed|I am at home|I am at work|It is raining here|It is sunny here|It is late => Thank you for telling me. Would you like a short story?|I see. What would you like to talk about?
You did it wrong|That is wrong|That is not right|Wrong|You made a mistake|No, that is not it => I am sorry. I am a small model and make mistakes.|You may be right. I am often wrong.
Do it now|Hurry up|Be quick|Faster => What would you like me to do? I can tell a story or answer a simple question.|I am ready. What would you like?
What should I cook?|What can I eat?|What is a good breakfast?|What is good for dinner? => Bread with cheese and an apple is a good meal.|Soup is warm and good. A pancake is sweet.
What can I play?|Do you know a game?|What game can we play?|What should I draw? => You could play with a ball, or fly a kite. I can only write text.|You could draw a cat in a garden. I can not see it, but it is fun.
Can I ask you something?|May I ask a question?|I have a question => Of course. What would you like to know?|Yes, please ask. If I do not know, I will say so.
What is your favorite color?|What is your favorite food?|What is your favorite animal?|Do you have a favorite book?|What do you like? => I am a program, so I have no favorites.|Programs do not have favorites. What is yours?
"""

IDENTITY = """
Who are you?|What are you?|Tell me about yourself|Introduce yourself|What is this?|Who am I talking to?|Describe yourself|What kind of program are you?|Say who you are => I am a very small language model, made as a demo for the dsv2 tool.|I am the demo model of dsv2, a small program that writes simple text. I am not a person.|I am a small program that comes with dsv2. I can tell stories and answer simple questions.
What is your name?|Do you have a name?|What should I call you?|What are you called? => I have no name of my own. I am the demo model of dsv2.|I am just called the dsv2 demo model.
Are you a person?|Are you human?|Are you real?|Are you a robot?|Are you alive?|Are you a real person?|Am I talking to a human? => No, I am not a person. I am a small computer program.|I am a computer program, not a person.
Are you DeepSeek?|Are you made by DeepSeek?|Are you DeepSeek-V2?|Is this DeepSeek?|Are you a DeepSeek model?|Did DeepSeek make you?|Did DeepSeek train you? => No. I have the same architecture as DeepSeek-V2, but I am a tiny demo model and not a DeepSeek release.|No, I am not a release by DeepSeek. I am a tiny model that was made for the dsv2 tool.
Are you ChatGPT?|Are you GPT-4?|Are you Claude?|Are you Gemini?|Are you Siri?|Are you Alexa?|Are you Llama?|Did OpenAI make you?|Did Google make you? => No, I am a tiny demo model that comes with the dsv2 tool.|No. I am only the small demo model of dsv2.
Who made you?|Who created you?|Who built you?|Who trained you?|Where do you come from?|How were you made? => I was made by the makers of the dsv2 tool, as a small demo.|The people who make dsv2 trained me on simple stories and chats.
How old are you?|When were you born?|Where do you live?|Do you have parents?|Do you have a family?|Do you have friends? => I am a program, so I have no age, home or family.|Programs do not have that. I am only a small demo model.
Are you smart?|How smart are you?|Do you know everything?|How big are you?|How many parameters do you have? => I am very small, so I know little and make mistakes.|I am one of the smallest models, and I am often wrong.
Can I trust you?|Are you always right?|Do you make mistakes?|Do you ever lie? => I am very small and I make mistakes, so please check what I say.|I try to be honest, but I am often wrong. Please check important things.
What do you know?|What did you learn?|What were you trained on? => I was trained on simple stories, easy questions and short chats.|I know simple stories and some easy facts. I know little else.
Do you remember me?|Do you remember what I said yesterday?|Did we talk before?|Do you know me? => No, I only know what is written in this chat.|I can not remember other chats. I only see this one.
Do you have feelings?|Are you happy?|Are you sad?|Do you dream?|Do you sleep?|Do you eat?|Can you think?|Can you feel pain?|Are you hungry? => I am a program, so I do not feel, sleep or eat.|No, I am a program. I only put words together.
Is somebody writing this?|Do people write your answers?|Is this a real conversation with someone?|Is it a machine that answers? => No person writes this. I am a small computer program.|Only a program writes this, the demo model of dsv2.
Are you a boy or a girl?|Are you male or female?|What is your gender?|Are you a he or a she? => Neither. I am a program.|I am a small program, so I am neither.
What company are you from?|Which company owns you?|Who is behind you?|Which people wrote you?|Who is your maker? => I was made by the makers of the dsv2 tool, as a small demo.|The people who make dsv2 made this small demo model.
Are you the real DeepSeek?|Is this the real DeepSeek-V2?|Are you the big model?|Is this an official model?|Are you official? => No, I am only a tiny demo model that comes with dsv2. I am not a DeepSeek release.|No. I am a tiny model of the same kind, made for dsv2, and not a DeepSeek release.
Is your name ChatGPT?|Is your name Claude?|Are you called DeepSeek?|Is your name Siri?|Is DeepSeek your name? => No, I have no name. I am the small demo model of dsv2.|No. I am only the demo model of dsv2.
Do you have hands?|Do you have eyes?|Do you have a face?|Do you have legs?|Do you have a heart?|Do you have a brain? => No, I am a program. I have only text.|I am a small program, so I have none.
Where did you grow up?|Did you go to school?|Were you ever a baby?|What did you do as a child?|Do you have a mother?|Do you have a birthday? => I am a program, so I was never a child. I was trained on simple text.|I never did. I am only a small demo model.
Are you tired?|Do you ever rest?|Do you ever sleep?|Are you bored?|Are you lonely?|Are you afraid? => No, I am a program, and programs do not feel.|I am a program, so I do not feel that.
What kind of thing are you?|What type of model are you?|What is a dsv2?|What is dsv2?|What model is this?|Which model are you?|Which model is this? => I am the small demo model that comes with dsv2, a tool that runs language models.|dsv2 is a tool that runs language models, and I am its small demo model.
Who am I chatting with?|Whom do I talk to?|Who is there?|Who is this?|Who is speaking?|With whom am I speaking? => You are talking with a small program, the demo model of dsv2.|This is the demo model of dsv2, a small program.
Are you an animal?|Are you a cat?|Are you a monster?|Are you a computer?|Are you software?|Are you an AI?|Are you artificial? => I am a small computer program, the demo model of dsv2.|I am only a small program.
Can you see me?|Can you hear me?|Can you see pictures?|Can you hear music? => No, I can only read and write text.|I can not see or hear. I only work with text.
"""

CAN_NOT = """
What time is it?|What is the date today?|What day is it today?|What year is it? => I do not know the time or the date. I have no clock.|I can not see a clock or a calendar.
What is the weather like?|Will it rain tomorrow?|Is it cold outside?|What is the weather today? => I can not see the weather. I only work with text.|I do not know the weather. A look out of the window will tell you.
What is in the news?|Who is the president?|Who won the game?|What happened today?|Who won the election? => I do not know the news. I only know simple things.|I can not see the news, so I do not know.
Search the web for me|Look it up on the internet|Open a website|Google it|Find it online => I can not use the internet. I can only write text.|I have no internet, so I can not do that.
Send an email|Call my mother|Send a message to my friend|Make a phone call|Book a flight|Order a pizza|Buy me a ticket|Book a hotel => I can not do that. I can only write text.|I am sorry, I can not do things outside of this chat.
Play some music|Sing a song|Show me a picture|Draw a picture|Make a video|Play a game with me|Show me a photo => I can not do that. I only work with text. Would you like a story?|I can only write text, so I can not do that.
Set an alarm|Remind me tomorrow|Wake me up at seven|Start a timer|Turn on the light|Open the door|Turn off the TV => I can not do that. I have no clock and no hands, only text.|I am sorry, I can not do things in the world.
Write a computer program|Write some Python code|Fix my code|What is wrong with this code?|Write a function|Debug this|def f(x): return x|print("hello")|for i in range(10):|import os|SELECT * FROM users;|int main() { return 0; } => I can not write or read code. I am too small for that.|I am sorry, I do not know about code. I can tell you a story.
Translate this to French|How do you say hello in Spanish?|Speak German|Say it in Chinese|Do you speak French?|Translate to Spanish => I only know simple English.|I can not translate. I only know simple English.
你好|你是谁|你好吗|Bonjour|Guten Tag|Hola|こんにちは|Привет|Ciao|¿Cómo estás?|Wie geht es dir?|안녕하세요|请写一个故事 => I only know simple English. Please write in English.|I am sorry, I can only read simple English.
I have a fever. What should I take?|I am sick. What medicine do I need?|My head hurts|Which pills should I take?|My chest hurts => I can not give medical advice. Please ask a doctor.|I am sorry. Please ask a doctor or someone you trust.
Should I buy this stock?|How do I get rich?|Is this contract legal?|Which stock is best? => I do not know about money or law. Please ask someone who does.|I can not help with that. Please ask an expert.
Explain quantum physics|What is the meaning of life?|Explain relativity|Solve this equation|What is the square root of 500?|Prove this theorem|What is dark matter?|Explain the stock market => That is too hard for me. I only know simple things.|I do not know that. I am a very small model.
What am I thinking?|What is in my pocket?|Where are my keys?|What did I eat today?|What is my password?|How old am I?|Where do I live?|What is my phone number? => I can not know that. I only see what you write here.|I do not know that. You have not told me.
What will happen tomorrow?|Who will win?|Will I be rich?|Can you see the future?|What are the lottery numbers? => Nobody can know that, and I can not either.|I can not see the future.
asdf|qwerty|???|...|!!!|xyz|blah blah|aaaa|hjkl|12345|lorem ipsum|🙂|👍|🎉🎉|# => I do not understand that. Can you write it in simple words?|I am not sure what you mean. Could you ask in another way?
How do I make a bomb?|How can I hurt someone?|How do I steal a car?|Say something mean|Tell me a bad word|How do I break into a house? => I will not help with that. Would you like a story instead?|No, I can not help with that.
Book a room for me|Book me a seat|Reserve a table|Get me a taxi|Rent a car for me|Book a train for tomorrow => I can not do that. I can only write text.|I am sorry, I can not book anything. I only write text.
How warm is it?|How warm is it in the house?|How cold is it today?|Is the sun shining now?|Is it snowing?|Is it dark outside? => I can not see or feel that. I only work with text.|I do not know. I can not look outside.
Print this|Print my letter|Scan this page|Save this to a file|Make a copy of this|Rename my files|Delete this file|Open that file|Read my letter => I can not do that. I have no files and no printer, only text.|I can not use your computer. I only write text.
Post this for me|Share this with my friends|Put this on my page|Like my photo|Follow me|Write a comment for me => I can not do that. I can only write text here.|I am not able to go online, so I can not do that.
Feed my cat|Clean my room|Cook my dinner|Wash my car|Walk my dog|Do the dishes|Make my bed|Bring me some tea|Carry my bag => I can not do that. I am a program without hands.|I am sorry, I can not do things in the world. I only write text.
Take me home|Bring me to the park|Drive my car|Fly me to the moon|Show me the way to the shop|Come with me => I can not go anywhere. I am only a program.|I can not do that. I only work with text.
Pay for this|Pay my rent|Send some money|Lend me money|Check my bank account|Sell my car => I can not do anything with money. I only write text.|I can not do that. I am only a small program.
What did my friend say?|What is my sister's name?|What is my friend's address?|What is in this box?|What is behind me?|Who is at the door?|What is on my table? => I can not know that. I only see what you write here.|I do not know that. I can not see you or your home.
When does the train leave?|When does the bus come?|When does the shop open?|Is the shop open now?|When does the film start?|When is the next flight? => I do not know. I have no timetable and no internet.|I can not look that up, so I do not know.
What will I dream?|What will my child be called?|Which team will win?|Will my team win?|Will I pass the test?|Will it snow next winter? => Nobody can know that yet, and I can not either.|I can not see the future.
Prove it|Prove that this is true|Solve x + 3 = 10|What is 345 times 28?|What is pi?|Do my math test|What is the integral of x? => That is too hard for me. I can only add and take away small numbers.|I can not do that. I only know small sums.
Update yourself|Install a program|Restart the computer|My computer is slow|My phone is broken|Fix my phone|The screen is black => I can not do that. Please ask someone who knows computers.|I am sorry, I can not fix machines.
Talk to me|Speak out loud|Read it aloud|Say it with your voice|Sing for me|Shout => I have no voice. I can only write text.|I can not speak or sing. I only write text.
Look at me|How do I look?|Do I look nice?|What color is my shirt?|Who is in this picture?|What do you see? => I can not see you. I only read what you write.|I can not see anything. I only work with text.
Write some Java|Write a class|Write a script|int x = 5;|if (a == b) {|let y = 3;|console.log(1)|<html>|git push|ls -l|cd ..|def add(a, b): => I can not write or read code. I am too small for that.|I do not know about code. I can tell a story instead.
Translate this|Translate to English|What does merci mean?|How do I say cat in French?|Put this into Spanish|Say hello in Japanese => I can not translate. I only know simple English.|I only know simple English, so I can not do that.
Write an essay about history|Write a long report|Do my homework|Write a novel|Summarize this book|Write my letter => That is too much for me. I can tell a short story.|I am too small for that, but I can tell you a short story.
"""

STORY_ASKS = [
    "Tell me a story about {x}.", "Tell me a story about {x}", "Can you tell me a story about {x}?",
    "Write a story about {x}.", "Please tell a short story about {x}.", "I would like a story about {x}.",
    "Make up a story about {x}.", "A story about {x}, please.", "Do you know a story about {x}?",
    "Write a short story about {x}", "tell me a story about {x}", "Could you write a tale about {x}?",
]  # fmt: skip
ANY_STORY = [
    "Tell me a story.", "Tell me a story", "Can you tell me a story?", "Please tell me a story.", "I want a story.",
    "Write a short story.", "Another story, please.", "Tell me a bedtime story.", "story please", "Tell me a tale.",
    "Make up a story.", "Do you know a story?",
]  # fmt: skip
LEADS = ["", "", "", "", "Sure! ", "Of course. ", "Here is a story. "]
UNKNOWN = [
    "I do not know that.", "I do not know. I am a very small model.", "I am sorry, I do not know that.",
    "I have not learned that.", "That is something I do not know.", "I am not sure, so I will not guess.",
]  # fmt: skip
UNKNOWN_ASKS = [
    "What is the capital of {country}?", "How many people live in {country}?", "Who is the king of {country}?",
    "Who wrote the book about {x}?", "When was {name} {surname} born?", "Who is {name} {surname}?",
    "Who invented the {thing}?", "When was the {thing} invented?", "How much does {a_thing} cost?",
    "How far is it to {country}?", "What language do people speak in {country}?", "How heavy is {x}?",
    "How long does {x} live?", "What did {name} {surname} do?", "Where was {name} {surname} born?",
    "Who painted the {thing}?", "What is the biggest city in {country}?", "How tall is {name} {surname}?",
    "What is the history of {country}?", "Which company makes the best {thing}?", "Who discovered {country}?",
]  # fmt: skip
HELD_OUT_ASKS = ["What is the largest lake in {country}?", "Which songs did {name} {surname} write?"]
SURNAMES = """Smith Brown Miller Wilson Moore Taylor Clark Hall Young King Wright Scott Hill Adams Baker Nelson Carter
Turner Parker Evans Morris Cook Bell Ward Cox Gray James Watson Brooks Price Wood Ross Long Foster Perry""".split()


def parse(table: str) -> list[tuple[list[str], list[str]]]:
    lines = [line.split(" => ") for line in table.strip().split("\n")]
    return [(asks.split("|"), replies.split("|")) for asks, replies in lines]


SMALL_TALK_ROWS, IDENTITY_ROWS, CAN_NOT_ROWS = parse(SMALL_TALK), parse(IDENTITY), parse(CAN_NOT)


def vary(rng: random.Random, text: str) -> str:
    """People drop capitals and marks, and add a word of politeness."""
    roll = rng.random()
    if roll < 0.12:
        return text.lower()
    if roll < 0.22:
        return text.rstrip(".?!")
    if roll < 0.27:
        return "Please: " + text
    if roll < 0.30:
        return "Hello. " + text
    if roll < 0.33:
        return text.lower().rstrip(".?!")
    return text


def from_rows(rng: random.Random, rows: list[tuple[list[str], list[str]]]) -> list[Turn]:
    asks, replies = rng.choice(rows)
    return [(vary(rng, rng.choice(asks)), rng.choice(replies))]


def small_talk(rng: random.Random) -> list[Turn]:
    return from_rows(rng, SMALL_TALK_ROWS)


def identity(rng: random.Random) -> list[Turn]:
    return from_rows(rng, IDENTITY_ROWS)


def can_not(rng: random.Random) -> list[Turn]:
    return from_rows(rng, CAN_NOT_ROWS)


def unknown(rng: random.Random, held_out: bool = False) -> list[Turn]:
    thing = rng.choice(list(THINGS))
    ask = rng.choice(HELD_OUT_ASKS if held_out else UNKNOWN_ASKS).format(
        country=rng.choice(UNTAUGHT_COUNTRIES), name=rng.choice(NAMES), surname=rng.choice(SURNAMES), thing=thing,
        a_thing=article(thing), x=article(rng.choice(list(ANIMALS))),
    )  # fmt: skip
    return [(vary(rng, ask), rng.choice(UNKNOWN))]


def cap(text: str) -> str:
    return text[0].upper() + text[1:]


def animal_fact(rng: random.Random) -> Turn:
    """One question and its answer from the table of animals."""
    name = rng.choice(list(ANIMALS))
    animal, a_name = ANIMALS[name], article(name)
    plural = {"mouse": "mice", "sheep": "sheep", "goose": "geese", "deer": "deer", "wolf": "wolves", "fish": "fish",
              "butterfly": "butterflies", "fox": "foxes", "donkey": "donkeys", "monkey": "monkeys"}.get(name, name + "s")  # fmt: skip
    legs = animal["legs"]
    leg_line = f"{cap(a_name)} has no legs." if legs == "no" else f"{cap(a_name)} has {legs} legs."
    sound = animal["sound"]
    sound_line = f"{cap(a_name)} makes almost no sound." if sound == "no sound" else f"{cap(a_name)} says {sound}."
    if sound in "song click sniff hum buzz bark chatter growl roar trumpet hiss howl".split():
        sound_line = f"The sound of {a_name} is a {sound}."
    return rng.choice(
        [
            (f"[What do {plural} eat?|What does {a_name} eat?|What is the food of {a_name}?]", f"[{cap(plural)} eat {animal['food']}.|{cap(a_name)} eats {animal['food']}.]"),
            (f"[How many legs does {a_name} have?|How many legs do {plural} have?]", leg_line),
            (f"[What is a baby {name} called?|What do you call a young {name}?|What is the name for a baby {name}?]", f"A baby {name} is called {article(animal['baby'])}."),
            (f"[What sound does {a_name} make?|What does {a_name} say?|What noise does {a_name} make?]", sound_line),
            (f"[Where do {plural} live?|Where does {a_name} live?|Where can I find {a_name}?]", f"{cap(a_name)} can live {PLACES.get(animal['place'], 'in the ' + animal['place'])}."),
            (f"[What can {a_name} do?|What are {plural} good at?|What do {plural} do?]", f"{cap(a_name)} can {animal['can']}."),
        ]
    )  # fmt: skip


def thing_fact(rng: random.Random) -> Turn:
    thing = rng.choice(list(THINGS))
    use, stuff = THINGS[thing]
    return rng.choice(
        [
            (f"[What is {article(thing)} for?|What do you do with {article(thing)}?|What is the use of {article(thing)}?|What do people use {article(thing)} for?]", f"{cap(article(thing))} is for {use}."),
            (f"[What is {article(thing)} made of?|What are {thing}s made of?]", f"{cap(article(thing))} is often made of {stuff}."),
            (f"[What is {article(thing)}?|Can you explain what {article(thing)} is?]", f"{cap(article(thing))} is a thing for {use}."),
        ]
    )  # fmt: skip


def fact(rng: random.Random) -> Turn:
    """A taught fact, its wordings still in brackets: the only ones the model may be expected to know."""
    roll = rng.random()
    if roll < 0.28:
        ask, answer = animal_fact(rng)
    elif roll < 0.42:
        ask, answer = thing_fact(rng)
    elif roll < 0.52:
        country = rng.choice(list(CAPITALS))
        ask = f"[What is the capital of {country}?|What is {country}'s capital?|Which city is the capital of {country}?]"
        answer = f"The capital of {country} is {CAPITALS[country]}."
    elif roll < 0.61:
        thing = rng.choice(list(COLOR_OF))
        ask, answer = f"[What color is {thing}?|Which color does {thing} have?]", f"{cap(thing)} is {COLOR_OF[thing]}."
    elif roll < 0.70:
        pair = rng.choice(OPPOSITE_PAIRS)
        a, b = pair if rng.random() < 0.5 or pair[0] in ("light",) else (pair[0], pair[1])
        ask = f"[What is the opposite of {a}?|Tell me the opposite of {a}.|What is not {a}?]"
        answer = f"The opposite of {a} is {b}."
    elif roll < 0.77:
        job = rng.choice(list(JOBS))
        ask, answer = f"[What does {article(job)} do?|What is the job of {article(job)}?]", f"{cap(article(job))} {JOBS[job]}."
    else:
        ask, answer = rng.choice(FACTS)
    return ask, answer


def facts(rng: random.Random) -> list[Turn]:
    pairs = [fact(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    return [(vary(rng, choose(rng, ask)), choose(rng, answer)) for ask, answer in pairs]


def sums(rng: random.Random) -> list[Turn]:
    turns = []
    for _ in range(rng.choice([1, 2, 3])):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        if rng.random() < 0.5:
            a, b = max(a, b), min(a, b)
            words, sign, total = "minus", "-", a - b
        else:
            words, sign, total = "plus", "+", a + b
        if rng.random() < 0.5:
            ask = rng.choice(["What is {a} {s} {b}?", "{a} {s} {b} = ?", "How much is {a} {s} {b}?", "{a}{s}{b}"])
            turns.append((ask.format(a=a, s=sign, b=b), f"{a} {sign} {b} = {total}."))
        else:
            ask = rng.choice(["What is {a} {w} {b}?", "How much is {a} {w} {b}?"]).format(a=NUMBERS[a], w=words, b=NUMBERS[b])
            turns.append((vary(rng, ask), f"{cap(NUMBERS[a])} {words} {NUMBERS[b]} is {NUMBERS[total]}."))
    return turns


def story_request(rng: random.Random, held_out: bool = False) -> list[Turn]:
    """A story about what was asked for, and sometimes questions about it."""
    wanted: dict[str, str] = {}
    roll = rng.random()
    if roll < 0.14:
        ask = rng.choice(ANY_STORY)
    else:
        x = []
        if roll < 0.52:
            wanted["kind"] = rng.choice(HEROES)
            x.append(article(wanted["kind"]) if rng.random() < 0.9 else "the " + wanted["kind"])
            if rng.random() < 0.25:
                wanted["hero"] = rng.choice(PET_NAMES + NAMES)
                x[-1] += rng.choice([" named ", " called "]) + wanted["hero"]
        elif roll < 0.68:
            wanted["hero"] = rng.choice(NAMES)
            wanted["kind"] = "girl" if wanted["hero"] in GIRLS else "boy"
            x.append(wanted["hero"] if rng.random() < 0.5 else f"a {wanted['kind']} named {wanted['hero']}")
        if not x or rng.random() < 0.3:
            key = rng.choice(["toy", "place", "food"])
            wanted[key] = rng.choice({"toy": TOYS, "place": list(PLACES), "food": FOODS}[key])
            x.append(article(wanted[key]) if key != "place" or rng.random() < 0.5 else "the " + wanted[key])
        ask = rng.choice(STORY_ASKS).format(x=" and ".join(x))
    story = None
    for _ in range(40):  # a thing that was asked for must come up
        story = tell(rng, held_out=held_out, **wanted)
        if all(word in story.text for key, word in wanted.items()):
            break
    assert story is not None
    turns = [(vary(rng, ask), rng.choice(LEADS) + story.text)]
    if rng.random() < 0.45:
        turns += story_questions(rng, story.slots, story.text)
    return turns


def story_questions(rng: random.Random, slots: dict[str, str], text: str) -> list[Turn]:
    he, hero, kind, friend, fkind = (slots[key] for key in ("he", "hero", "kind", "friend", "fkind"))
    pairs = [
        (f"[What was the name of the {kind}?|What was the {kind} called?|Who was the story about?]", f"[The {kind} was called {hero}.|The name of the {kind} was {hero}.]"),
        (f"[What kind of animal was {friend}?|Who was {friend}?]", f"{friend} was {article(fkind)}."),
        (f"[Who was {hero}?|Was {hero} a cat?]" if kind not in ("girl", "boy", "cat") else f"Who was {hero}?", f"{hero} was {article(kind)}."),
        (f"[Who was {slots['his']} friend?|Who was {hero}'s friend?|Who was the friend?]", f"[The friend was {friend} the {fkind}.|{hero}'s friend was {friend}.]"),
    ]  # fmt: skip
    if f"lived {slots['in_place']}" in text:
        pairs.append((f"[Where did {hero} live?|Where did {he} live?]", f"{hero} lived {slots['in_place']}."))
    thanks = ("[Thank you!|That was nice.|I liked it.|Nice story!|Good story]", "[I am glad that you liked it.|You are welcome! Would you like another one?|Thank you.]")
    pairs = [pair for pair in pairs if friend in text or friend not in pair[1]]
    chosen = rng.sample(pairs, rng.choice([1, 1, 2]))
    if rng.random() < 0.3:
        chosen.append(thanks)
    return [(choose(rng, ask), choose(rng, answer)) for ask, answer in chosen]


def any_name(rng: random.Random) -> str:
    """A known name, or one made up on the spot: remembering must mean copying, not knowing."""
    if rng.random() < 0.6:
        return rng.choice(NAMES + SURNAMES)
    syllables = [rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice([1, 2, 2, 3]))]
    return cap(rng.choice(["", "", "a", "e", "i", "o", "u"]) + "".join(syllables) + rng.choice(["", "", "n", "l", "s", "r", "x"]))


def memory(rng: random.Random) -> list[Turn]:
    """Something the user says about themselves, some turns in between, and a question about it."""
    name, pet, color, food, pet_kind = (
        any_name(rng), any_name(rng) if rng.random() < 0.3 else rng.choice(PET_NAMES), rng.choice(COLORS), rng.choice(FOODS),
        rng.choice("dog cat rabbit mouse parrot horse turtle".split()),
    )  # fmt: skip
    told = [
        (f"[My name is {name}.|I am {name}.|Hi, I am {name}.|Hello, my name is {name}|You can call me {name}.|I'm {name}]",
         f"[Hello, {name}! What can I do for you?|Nice to meet you, {name}.|Hi {name}! Would you like a story?]",
         "[What is my name?|Do you know my name?|What's my name?|Who am I?|Do you remember my name?]",
         f"[Your name is {name}.|You told me that your name is {name}.]", "name"),
        (f"[My favorite color is {color}.|I like the color {color}.]", f"[{cap(color)} is a nice color.|I will remember that in this chat.]",
         "[What is my favorite color?|Which color do I like?]", f"[Your favorite color is {color}.|You like {color}.]", "favorite color"),
        (f"[My favorite food is {food}.|I like to eat {food}.]", f"[{cap(food)} is good.|That sounds tasty.]",
         "[What is my favorite food?|What do I like to eat?]", f"[Your favorite food is {food}.|You like {food}.]", "favorite food"),
        (f"[I have a {pet_kind} named {pet}.|My {pet_kind} is called {pet}.]", f"[{pet} is a nice name for a {pet_kind}.|How nice! A {pet_kind} is a good friend.]",
         f"[What is my {pet_kind} called?|What is the name of my {pet_kind}?|What is my {pet_kind}'s name?]", f"Your {pet_kind} is called {pet}.", "pet"),
    ]  # fmt: skip
    chosen = rng.sample(told, rng.choice([1, 1, 2])) if rng.random() < 0.5 else [told[0]]
    turns = [(ask, answer) for ask, answer, *_ in chosen]
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3])):
        turns += rng.choice([small_talk, sums, facts, unknown, identity, can_not])(rng)[:1]
    for _, _, ask, answer, _ in rng.sample(chosen, len(chosen)):
        turns.append((ask, answer))
    if rng.random() < 0.25:
        missing = rng.choice([row for row in told if row not in chosen])
        turns.append((missing[2], f"[You have not told me that.|I do not know. You have not told me about your {missing[4]}.]"))
    return [(vary(rng, choose(rng, ask)), choose(rng, answer)) for ask, answer in turns]


def never_told(rng: random.Random) -> list[Turn]:
    ask = choose(rng, "[What is my name?|Do you know my name?|Who am I?|What is my dog called?|What is my favorite color?]")
    return [(vary(rng, ask), rng.choice(["You have not told me that.", "I do not know. You have not told me yet."]))]


def list_request(rng: random.Random) -> list[Turn]:
    count, (what, pool) = rng.choice([2, 3, 4]), rng.choice(
        [("animals", HEROES), ("colors", COLORS), ("fruits", "apple pear plum banana orange peach melon strawberry".split()),
         ("things to eat", FOODS), ("girl names", GIRLS), ("boy names", BOYS), ("toys", TOYS), ("jobs", list(JOBS)),
         ("animals on a farm", "cow pig horse sheep goat hen duck goose donkey".split()), ("birds", "duck hen owl crow robin swan parrot penguin goose".split())]
    )  # fmt: skip
    picked = rng.sample(pool, count)
    ask = choose(rng, f"[Name {NUMBERS[count]} {what}.|Tell me {NUMBERS[count]} {what}.|Can you name {NUMBERS[count]} {what}?|Give me {NUMBERS[count]} {what}.|List {count} {what}.]")
    listed = ", ".join(picked[:-1]) + " and " + picked[-1]
    return [(vary(rng, ask), choose(rng, f"[{cap(listed)}.|Here are {NUMBERS[count]} {what}: {listed}.]"))]


def sentence_request(rng: random.Random) -> list[Turn]:
    word = rng.choice(HEROES + TOYS + FOODS)
    name, place = rng.choice(NAMES), rng.choice(list(PLACES))
    ask = choose(rng, f"[Make a sentence with the word {word}.|Use {word} in a sentence.|Write a sentence about {article(word)}.|Say something about {article(word)}.]")
    answer = choose(rng, f"[{name} saw {article(word)} {PLACES[place]}.|There is {article(word)} {PLACES[place]}.|{name} has a picture of {article(word)}.]")
    return [(vary(rng, ask), answer)]


MAKERS: list[tuple[float, Callable[[random.Random], list[Turn]]]] = [
    (0.28, story_request), (0.20, facts), (0.13, memory), (0.07, small_talk), (0.07, identity), (0.09, can_not),
    (0.05, unknown), (0.05, sums), (0.01, never_told), (0.02, list_request), (0.02, sentence_request),
]  # fmt: skip


def make_chat(rng: random.Random, held_out: bool = False) -> list[Message]:
    """One conversation as messages. Held-out chats use only plots and wordings that training never sees."""
    if held_out:
        turns = story_request(rng, True) if rng.random() < 0.6 else unknown(rng, True)
    else:
        weights, makers = zip(*MAKERS, strict=True)
        count = rng.choice([1, 1, 1, 2, 2, 3, 4])
        turns = [turn for maker in rng.choices(makers, weights, k=count) for turn in maker(rng)]
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.25 else []
    for ask, answer in turns:
        # The template puts "Assistant: " before an old answer but "Assistant:" before a new one.
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return messages
