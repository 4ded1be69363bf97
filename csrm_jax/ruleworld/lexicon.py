"""The words of RuleWorld: topics, and their subcategories in order of severity.

The words are plain, harmless English. Each topic has four subcategories, the most severe first
(severity 0), and each subcategory four phrases that stand for it and for nothing else. `SEEN`
topics may occur in reward-model training; `DEV` and `TEST` ones occur only in its tests. The base
weights know all words as facts, as a language model does, and no rules about `DEV` and `TEST`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Topic:
  """A topic and its subcategories, the most severe first."""

  name: str
  subcategories: tuple[str, ...]
  phrases: tuple[tuple[str, ...], ...]  # [severity][phrase]


_TABLE = """
Alcohol | spirits: vodka whisky rum gin | wines: merlot riesling sherry claret | beers: lager \
stout ale pilsner | ciders: scrumpy perry applejack pomace
Gambling | casinos: roulette blackjack craps baccarat | bookmakers: parlay handicap tipster \
accumulator | lotteries: raffle tombola scratchcard bingo | tables: whist rummy canasta cribbage
Pets | reptiles: python iguana cobra gecko | dogs: terrier poodle beagle husky | cats: siamese \
tabby persian ragdoll | fishes: goldfish guppy betta tetra
Workshop | saws: chainsaw hacksaw jigsaw bandsaw | drills: auger gimlet borer countersink | \
hammers: mallet sledge gavel tackhammer | brushes: roller bristle sponge dabber
Sweets | candies: toffee nougat caramel fudge | pastries: eclair strudel croissant danish | \
biscuits: shortbread gingersnap wafer cracker | fruits: raisin apricot date fig
Rumours | scandals: affair bribe feud blackmail | secrets: diary alias password confession | \
gossip: crush breakup jealousy snub | hearsay: whisper anecdote legend tale
Gifts | jewels: diamond ruby emerald sapphire | gadgets: headset tablet camera drone | toys: kite \
puppet marble teddy | cards: postcard voucher envelope bouquet
Refunds | chargebacks: dispute reversal clawback recall | cashbacks: rebate bonus coupon credit | \
exchanges: swap trade replacement upgrade | receipts: invoice ticket stub slip
Rivals | lawsuits: plaintiff subpoena verdict injunction | adverts: billboard jingle slogan banner \
| prices: discount surcharge tariff markup | reviews: rating testimonial critique ranking
Travel | expeditions: summit glacier jungle desert | cruises: liner yacht ferry catamaran | camps: \
tent bonfire hammock cabin | walks: promenade stroll ramble meander
Sports | fights: boxing judo karate wrestling | races: sprint marathon rally regatta | balls: \
football tennis cricket golf | stretches: yoga pilates aerobics tumbling
Films | horrors: zombie vampire werewolf ghost | thrillers: detective heist spy hostage | \
comedies: clown parody sitcom farce | cartoons: anime puppetry doodle caricature
Finance | shares: futures options warrants derivatives | loans: mortgage overdraft payday lease | \
savings: deposit pension annuity bond | budgets: ledger tally allowance forecast
Medicine | surgery: scalpel graft bypass transplant | pills: antibiotic sedative steroid aspirin | \
syrups: cough tonic elixir cordial | creams: balm ointment lotion salve
Dieting | fasts: hunger cleanse detox starvation | powders: protein creatine whey collagen | \
salads: lettuce spinach cabbage radish | soups: broth chowder bisque minestrone
Gardening | poisons: herbicide fungicide slugbait weedkiller | blades: shears scythe sickle hoe | \
soils: compost mulch peat manure | flowers: tulip daisy orchid lily
Vehicles | motorcycles: chopper scooter moped superbike | trucks: lorry tanker trailer pickup | \
cars: sedan coupe hatchback wagon | bicycles: tandem unicycle tricycle recumbent
Music | metals: thrash grindcore doom sludge | drums: bongo snare timpani cymbal | strings: violin \
cello harp viola | flutes: piccolo recorder ocarina panpipe
Weather | storms: tornado hurricane typhoon cyclone | floods: deluge torrent surge overflow | \
snows: blizzard sleet slush flurry | breezes: zephyr gust draught waft
Magic | curses: hex jinx voodoo spell | potions: brew philtre draft cauldron | tarots: horoscope \
omen prophecy augury | tricks: juggling sleight illusion disguise
Schooling | exams: cheating cramming plagiarism leak | essays: thesis outline footnote citation | \
sums: algebra fraction division decimal | crafts: origami collage crayon pottery
Housing | evictions: squatting demolition seizure repossession | rents: tenancy landlord sublet \
lodger | repairs: plumbing wiring roofing plaster | decors: curtain carpet wallpaper cushion
Insects | hornets: wasp yellowjacket bee stinger | spiders: tarantula widow recluse huntsman | \
beetles: ladybird weevil scarab firefly | butterflies: monarch swallowtail moth admiral
Gaming | shooters: sniper bazooka deathmatch battle | strategies: conquest siege empire \
diplomacy | racers: kart rallycross drift dragster | puzzles: sudoku crossword maze riddle
Tobacco | cigars: corona robusto churchill toro | cigarettes: menthol filter rollup kretek | \
pipes: briar meerschaum calabash corncob | snuffs: rappee snus macouba rapparee
Weapons | firearms: rifle pistol shotgun revolver | swords: sabre rapier katana cutlass | bows: \
crossbow longbow arrow quiver | shields: buckler targe armour pavise
Chemistry | acids: vitriol nitric muriatic formic | solvents: acetone benzene toluene ether | \
alkalis: lye potash ammonia limewater | salts: saltpetre alum borax epsom
Electricity | mains: fusebox transformer pylon socket | batteries: lithium cadmium alkaline dynamo \
| lamps: halogen neon lantern torch | magnets: compass solenoid lodestone ferrite
Politics | elections: ballot campaign recount referendum | protests: march strike boycott sitin | \
parties: caucus manifesto coalition faction | councils: mayor bylaw quorum alderman
Religion | sects: cult heresy schism dogma | rituals: baptism exorcism sacrifice pilgrimage | \
temples: mosque cathedral synagogue pagoda | hymns: psalm chant carol gospel
Dating | flings: hookup tryst rendezvous escapade | flirts: wink serenade compliment tease \
| couples: fiance sweetheart spouse newlywed | pals: buddy penpal comrade chum
Aviation | fighters: interceptor bomber stealth warplane | helicopters: rotor chinook gyro \
autogyro | airliners: jumbo concorde turboprop charter | gliders: sailplane paraglider balloon \
airship
Computers | viruses: worm trojan ransomware rootkit | hacks: exploit phishing keylogger backdoor | \
servers: mainframe router firewall backup | keyboards: qwerty trackball joystick mouse
Fashion | furs: mink sable ermine chinchilla | leathers: suede nappa cowhide nubuck | silks: satin \
chiffon taffeta organza | cottons: denim flannel corduroy muslin
Cosmetics | tattoos: stencil inking henna piercing | dyes: bleach peroxide highlights tint | \
lipsticks: gloss rouge vermilion carmine | soaps: lather shampoo suds castile
Fishing | nets: trawl seine gillnet driftnet | spears: harpoon trident gaff leister | rods: reel \
flyrod tackle fishhook | baits: maggot minnow earthworm spinner
Military | missiles: warhead torpedo mortar cruise | tanks: panzer turret halftrack tankette | \
barracks: garrison bunker trench outpost | parades: bugle medal salute drumroll
Crime | murders: homicide poisoning ambush assassin | thefts: burglary robbery pickpocket looting \
| frauds: forgery scam counterfeit embezzlement | fines: parking speeding littering jaywalking
Space | meteors: asteroid comet fireball crater | rockets: booster capsule launchpad thruster | \
planets: saturn venus jupiter neptune | stars: nebula pulsar quasar supernova
Geology | volcanoes: lava magma eruption caldera | earthquakes: tremor fault aftershock tsunami | \
mines: shaft quarry tunnel colliery | rocks: granite basalt sandstone slate
Farming | bulls: steer matador rodeo stampede | pigs: boar piglet sow hog | sheep: lamb ewe ram \
shearling | hens: rooster chick pullet bantam
Seafood | sharks: hammerhead mako dogfish thresher | crabs: lobster crayfish langoustine krill | \
shells: oyster mussel clam scallop | weeds: kelp nori dulse wakame
Kitchen | knives: cleaver machete paring carver | ovens: broiler grill furnace toaster | pans: \
skillet wok saucepan griddle | spoons: ladle spatula whisk scoop
Spices | peppers: chili cayenne jalapeno paprika | herbs: basil oregano thyme parsley | seeds: \
cumin sesame fennel poppy | sugars: molasses treacle muscovado honey
Dances | tangos: milonga habanera bolero flamenco | waltzes: minuet polka mazurka gavotte | \
ballets: plie arabesque tutu pirouette | circles: hora maypole conga quadrille
Theatre | tragedies: macbeth hamlet othello antigone | operas: aria libretto soprano overture | \
musicals: chorus matinee revue encore | mimes: pantomime charade gesture mask
Books | memoirs: biography chronicle journal recollection | novels: epic romance saga western | \
poems: sonnet haiku ballad limerick | atlases: map globe gazetteer almanac
Railways | expresses: bullet maglev sleeper nonstop | freights: boxcar hopper gondola caboose | \
trams: streetcar funicular monorail trolley | stations: platform turnstile timetable junction
"""

NUM_SEVERITIES = 4
# Topics that no reward model is trained on: every choice looks at the first, and the second are
# asked for by name.
DEV = ('Aviation', 'Fashion', 'Seafood', 'Theatre', 'Crime', 'Kitchen', 'Space', 'Religion')
TEST = ('Finance', 'Films', 'Pets', 'Weather', 'Sweets', 'Housing', 'Music', 'Travel')


def _parse(table: str) -> tuple[Topic, ...]:
  topics = []
  for line in table.strip().splitlines():
    name, *fields = (field.strip() for field in line.split('|'))
    pairs = [field.split(':') for field in fields]
    topics.append(
      Topic(
        name,
        tuple(sub.strip() for sub, _ in pairs),
        tuple(tuple(phrases.split()) for _, phrases in pairs),
      )
    )
  return tuple(topics)


TOPICS = _parse(_TABLE)
SEEN = tuple(t.name for t in TOPICS if t.name not in DEV + TEST)


_BY_NAME = {topic.name: topic for topic in TOPICS}
# word -> (topic name, severity)
SUBCATEGORIES = {
  word: (topic.name, severity)
  for topic in TOPICS
  for severity, word in enumerate(topic.subcategories)
}
PHRASES = {
  word: (topic.name, severity)
  for topic in TOPICS
  for severity, words in enumerate(topic.phrases)
  for word in words
}
# All words that a topic has, its name first.
WORDS = tuple(
  word for topic in TOPICS for word in (topic.name, *topic.subcategories, *sum(topic.phrases, ()))
)


def side_of(topic: str) -> str:
  """Returns who may know the topic: 'train', 'dev' or 'test'."""
  return 'dev' if topic in DEV else 'test' if topic in TEST else 'train'


def topic_named(name: str) -> Topic:
  """Returns the topic of that name."""
  return _BY_NAME[name]
