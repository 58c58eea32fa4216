"""espeak-ng's own variants, shared out among the splits of the quickstart: who is heard in one is heard in no other."""

# Those held out are understood by the digit judge, at most 15% word error over rates of 130 to 190, and so is the first
# half of those trained on. The other half, up to 88%, teaches a model to hear past a voice; whispering and croaking
# ones are left out. No test one but klatt3 has the resonances of a training one; klatt3 has espeak-ng's own, with a
# source of its own.
TRAIN_VARIANTS = (
    *("", "klatt", "klatt2", "klatt4", "klatt5", "caleb", "sandro", "adam", "grandpa", "f1", "f4"),
    *("m1", "m5", "m7", "Diogo", "Hugo", "miguel", "benjamin", "mike2", "aunty"),
    *("john", "Gene2", "Nguyen", "robosoft", "robosoft2", "robosoft3"),
    *("Andrea", "Annie", "belinda", "anika", "grandma", "Denis", "Henrique", "Jacky", "Lee"),
    *("Marco", "Michael", "Mike", "antonio", "boris", "david", "ed", "gustave", "iven"),
    *("iven2", "marcelo", "max", "norbert", "paul", "pedro", "quincy", "rob"),
    *("shelby", "travis", "zac", "m8", "Storm", "ian"),
)
VALID_VARIANTS = (
    *("f3", "m4", "klatt6", "Alex", "linda", "michel"),
    *("Mario", "Gene", "announcer", "robert", "Alicia", "pablo"),
)
TEST_VARIANTS = ("f2", "f5", "m2", "m3", "m6", "klatt3", "edward", "Reed", "steph", "steph2", "victor")
