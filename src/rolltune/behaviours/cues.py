"""The cue words of :mod:`rolltune.behaviours.counter`, one regular expression per line.

They match one normalised sentence: lower case, single spaces, plain quotes and operators. ``<name>`` stands for a
fragment of :data:`_FRAGMENTS`. Every repetition is bounded, so that matching takes time linear in the sentence.
"""

from __future__ import annotations

import re

_FRAGMENTS = {
    # The model itself as the subject. Stories are about others or in the past.
    "me": (
        r"\b(?:let me|let us|let'?s|i am going to|i'm going to|(?:i|we)(?:'ll|'d|'m|'re)?"
        r"(?: will| can| could| should| would| must| need to| have to| want to| ought to| might| may| am| are)?)"
        r"(?: (?:just|also|now|then|first|quickly|always|still|really|better|at least|briefly|simply|so|have|to)){0,2}"
    ),
    # Words allowed before a clause without a subject.
    "lead": (
        r"^(?:(?:so|now|ok|okay|and|but|then|next|hmm+|um|ah+|oh|argh|ugh|well|fine|great|good|yes|yep|yeah|no|nope|"
        r"alright|also|actually|finally|lastly|therefore|thus|hence|maybe|perhaps|here|still|again|right|just|since|"
        r"because|as|thinking:)[,.:! ]+){0,4}"
    ),
    "i": r"\b(?:i|we)",
    "i_would": r"\b(?:i|we)(?:'d| would| will|'ll| still| now| then| just| first)?",
    "not": r"(?:does not|doesn'?t|do not|don'?t|did not|didn'?t|won'?t|will not|can'?t|cannot|couldn'?t|isn'?t|is not)",
    "it": r"\b(?:that|this|it|which)",
    "the": r"(?:the|my|our)",
    "goal": r"(?:target|goal)",
    "check": r"(?:double[- ]?check|re-?check|cross-?check|check|verify|confirm|validate|make sure|be sure)",
    "find": r"(?:find(?: out)?|calculate|determine|compute|figure out|work out|solve for|identify)",
    # These verbs also describe existing things.
    "reach": r"(?:get|make|reach|know|build|obtain|have|form|create)",
    "need": r"(?:need|have|want|must|should|try|going|like)(?: to)?",
}


def _any(*cues: str) -> re.Pattern[str]:
    return re.compile("|".join(re.sub(r"<([a-z_]+)>", lambda name: f"(?:{_FRAGMENTS[name[1]]})", cue) for cue in cues))


CONDITIONAL = _any(r"<lead>(?:if|when|whenever|unless)\b")

# --- verification -----------------------------------------------------------------------------------------------------

CHECK_ANNOUNCED = _any(
    r"<me> <check>\b(?!-| (?:in|out|on|my)\b)",
    r"\b(?:plug|plugg|substitut)(?:e|es|ed|ing)?\b.{0,40}\b(?:back|into (?:the |both )?original|in the original)\b"
    r"(?!.{0,60}\b(?:get|find|solve)\b)",
)
# Without a subject, the text may tell someone to check something, so these need a result to check.
BARE_CHECK_ANNOUNCED = _any(
    r"<lead>to (?:be sure|be safe|<check>)(?:[,:]| (?:that|this|it|the (?:answer|result|solution)|my|our)\b)",
    r"<lead>(?:as a (?:\w+ )?check|(?:sanity |quick |final |double[- ]|re-?|cross-?)?check(?:ing|ed|s)?|verify|"
    r"verifying|verification|confirm(?:ing)?|testing|test)"
    r"(?:[:,]| [\\[$({]| (?:that|this|whether|if|the (?:answer|result|whole|sum|total)|against|again|by|with|it|-|\d|"
    r"\()|(?: \w+){1,3}:|$)",
    # "Does it match?", "Is that right?", "Is 8 hours plausible?"
    r"\b(?:does|do|is|are|did) (?:this|that|it|these|they|everything|x|one of (?:them|these|those)|"
    r"any of (?:them|these)|the (?:answer|result|total|sum|value|solution|number)s?|(?:that |it )?-?\d+)\b[^?]{0,40}?"
    r"\b(?:match|right|correct|work|check out|make sense|equal|satisfy|add up|fit|reasonable|plausible|believable|"
    r"sound (?:right|ok)|hold|the target)\b[^?]{0,40}\?",
    r"\b(?:is|does) (?:that|this|it|one of (?:them|these|those)|any of (?:them|these))(?: equal| make| give)?(?: to)? "
    r"\d+\?",
)
# Count only near a calculation.
VERDICT = _any(
    # compared with the target: not equal
    r"\b(?:is|are|was|'s|gives?|makes?|equals?)(?: \w+)? not (?:equal|exactly|quite|even|the target|the goal|\d|what)",
    r"(?:\b(?:isn'?t|is not|aren'?t|does(?:n'?t| not) (?:equal|give|make|match|reach|come to)|not equal to)|!=)"
    r"(?: (?:equal to|quite|exactly))? (?:the target|the goal|\d|it\b|what)",
    r"\b(?:that|this|it)(?:'s| is) not it\b",
    r"<lead>not (?:quite |exactly )?(?:\d|the target|it\b|equal)",
    r"\b(?:none|not one|not any|neither) of (?:these|them|those|the \w+) (?:is|are|match|equal|give|work|hit|reach)",
    r"\bbut (?:i|we|the (?:target|goal|problem|question|text))(?: \w+)? ?"
    r"(?:need|want|is|says?|should|was|wanted|needed)",
    r"\b\w+ the <goal> (?:is|was) \d+,? not\b",
    # the distance to the target
    r"\btoo (?:high|low|big|small|large|far)\b",
    r"\b(?:that|this|it|which)(?: is|'s) (?:\w+ )?too (?:much|little|many|few)\b",
    r"\b(?:over|under)sh(?:oots?|ot)\b",
    r"\bfalls? short\b",
    r"\b\d+ is (?:greater|larger|more|less|smaller|bigger|higher|lower) than \d",
    r"\b(?:greater|larger|more|less|smaller|bigger) than (?:i|we) (?:need|want)\b",
    r"\b(?:above|below|past|short of|off|away from|larger than|smaller than|more than|less than) <the> <goal>",
    r"\b(?:off|short|over|under) by (?:\d|one|two|three|a few)",
    r"\bway (?:over|under|off|above|below)\b",
    r"(?:\b(?:that is|that's|still|only|just|are)|[,(]) ?\d+ (?:too \w+|short|off|away|over|above|below)\b"
    r"(?! the \w+ of)",
    # compared with the target: equal
    r"\bequal to (?:the )?target\b",
    r"\b(?:exactly|equals|reaches|reached|hits|hit|is|that'?s|matches|matching|gives|gets|on|=) (?:exactly )?"
    r"(?:<the> )?<goal>\b",
    r"<it> (?:hits|reaches|lands on) (?:exactly )?\d",
    r"\b<goal> (?:is |was )?(?:reached|hit|met|achieved|matched)\b",
    r"\b(?:what|exactly|just|as)(?: what)? (?:i|we|is|was|it)(?: \w+)? (?:need|want|needed|wanted|required|should)\b",
    r"\bas (?:it should be|it must be|required|expected|desired|wanted)\b",
    r"\b(?:that|this|it|which|these|those|both|all|everything|"
    r"<the> (?:answer|result|sum|total|numbers?|values?|solution|sides?|equation|units?|figures?|math))"
    r"(?: (?:all|both|also|indeed|exactly|does|do|really|now|perfectly|still))? "
    r"(?:match(?:es)?|checks? out|adds? up|agrees?|fits?|satisf(?:y|ies)|holds?|makes? sense|works?|confirms?|"
    r"(?:is|are) (?:indeed )?(?:correct|consistent|plausible|reasonable|equal))"
    r"(?=[.,!:;)\]\-]|$| (?:and|so|the|what|our|with|exactly|too|both|all|perfectly|here|well|as)\b)",
    r"\b(?:that|this|it)(?:'s| is) (?:indeed |exactly |also )?(?:correct|right)\b"
    r"(?! (?:angle|triangle|next|behind|above))",
    r"<it>(?: all)? (?:seems?|looks?|sounds?) (?:about )?(?:right|correct|reasonable|plausible|good|fine)\b",
    r"\bboth (?:\w+ )?(?:give|agree|match|come to)\b",
    r"\bconfirm(?:s|ing) (?:it|this|that|the (?:answer|result))\b",
    r"<lead>correct\b",
    r"\bindeed\b",
    # the conditions of the problem
    r"\b(?:that|this|it|which|\d+) fails\b|^fails\b",
    r"<it> (?:can'?t|cannot|can not) be(?: right| correct| true)?\b",
    r"\b(?:contradicts?|violates?|does(?:n'?t| not) make sense|makes no sense)\b",
    r"\buses? \S+ twice\b",
    r"\bappears? (?:exactly |only )?once\b",
    r"\b(?:root|solution|value|case|answer) (?:must be|is|can be|has to be|gets) "
    r"(?:rejected|discarded|extraneous|ruled out|excluded|invalid|impossible|not valid)\b",
    "[\N{CHECK MARK}\N{HEAVY CHECK MARK}\N{WHITE HEAVY CHECK MARK}\N{BALLOT X}\N{HEAVY BALLOT X}\N{CROSS MARK}]",
)
# "44, not 41" about a result; about anything else it is a plain statement.
CONTRAST = _any(
    r"[,(:-] ?(?:but |and |so |again |still |close,? |almost,? |no,? ){0,3}not (?:quite |exactly )?"
    r"(?:\d|the target|it\b|what)"
)
POINTS_BACK = _any(r"<it>\b")
NUMBERS_USED = _any(
    r"\b(?:each|every|all)(?: \w+)? numbers? .{0,25}\bused\b",
    r"\bus(?:es|ed|ing) (?:all|each|every)\b.{0,30}\bnumbers?\b",
    r"\bused (?:exactly |only |just )?once\b",
)
STATES_RULE = _any(
    r"\b(?:must|may|should|have to|has to|needs? to|to be|be used|want|trying|only be)\b",
    r"\bcan\b(?! (?:also )?(?:confirm|see|check|verify))",
)

# --- backtracking -----------------------------------------------------------------------------------------------------

GIVES_UP = _any(
    # the path does not work
    r"\b(?:that|this|it|which|these|those|none of (?:these|them|those)|neither|"
    r"(?:this|that|the) (?:approach|path|way|combination|attempt|idea|route|method|line))(?: \w+)? <not>(?: \w+)? "
    r"(?:work|working|help|helping|lead|leading|get me|get us|getting me|getting us)\b"
    r"(?! (?:on|at|in|for|out|nights|weekends)\b)",
    r"\b(?:this|that) \w+ <not> (?:work|help)\b",
    r"= ?\S+ <not> work\b",
    r"<lead>(?:so|then) \S+ <not> work\b",
    r"<lead>(?:no luck|no good|<not> work|not working|useless)\b",
    r"\bdead[- ]end\b(?! (?:street|road|alley|job|of))",
    r"\b(?:leads?|gets?|getting|brings?|goes|going)(?: me| us| this)? nowhere\b",
    r"<i> see no way\b",
    r"\b(?:i am|i'm|we are|we're) stuck\b",
    r"\bno use\b",
    # the path was wrong
    r"<lead>(?:hold on,? ?)?wait\b(?=[,.!:]|-|$|"
    r" (?:no|a (?:second|minute|moment)|that|this|i|actually|let|but|what|maybe|if|the problem|so|it|now)\b)",
    r"[,.)] ?(?:oh |no |but )?wait,? (?:no|but|that|i|actually|it)\b",
    r"\bhold on\b(?! to)",
    r"\bactually,? (?:no|wait)\b",
    r"\b(?:my mistake|my bad|oh no|oops|whoops|i was wrong|i mean \d+)\b",
    r"\bi (?:just )?(?:made (?:a|an) (?:\w+ )?(?:mistake|error)|misread|misunderstood|miscounted|miscalculated)\b",
    r"\bi (?:just )?forgot (?:that|about|to (?:add|count|include|subtract|carry|use|divide|multiply))\b",
    r"(?:<lead>|[,:] (?:but |so |no )?)(?:that|this|it|which|\d+)(?:'s| is| was|s)? "
    r"(?:not right|not correct|wrong|incorrect|a mistake)\b(?! (?:number|way))",
    # the path is abandoned
    r"\b(?:scratch that|never ?mind|nvm|on second thought|let (?:it|that) go)\b",
    r"<me> (?:drop|dropped|abandon|abandoned|discard|discarded|scrap|scrapped|give up|ruled? out|ignore|forget) "
    r"(?:that|this|it|on|both|the (?:first|second|last|other|idea|plan)|\d|\()",
    r"(?:<lead>|[,:] (?:so )?)(?:drop|abandon|discard|scrap|ignore|forget) (?:that|this|it|\d|\()",
    r"\bi give up\b(?! (?:my|the|\$?\d))",
    r"<lead>ruled out\b|\b(?:is|are|this|that) ruled out\b",
)
RESTARTS = _any(
    r"(?:<lead>|<me> |[,:] |\band )(?:go|going|take a step|step|stepping|turn|turning|come|back) back(?: up)?"
    r"(?= ?[.,!:;)]|$| to (?:the )?(?:start|beginning|step|problem|equation|question|previous|first|numbers|where|my|"
    r"our|\d|original|top|idea|drawing)| and (?:try|re|check|start|look|think|use|see))",
    r"(?:<lead>|<me> )(?:back(?:ing)? (?:up|to (?:the (?:start|beginning|numbers)|square|\d))|back[.!]?$|"
    r"backtrack(?:ing)?)",
    r"(?:<lead>|<me> |[,:] |\band )(?:start|begin|starting|beginning) "
    r"(?:over|again|afresh|anew|from scratch|from the (?:start|beginning)|with something)\b",
    r"(?:<lead>|<me> |[,:] |\band )(?:try|trying|attempt|think|consider|look for|need|think of|use|using) "
    r"(?:it |this |that )?(?:again|something (?:else|different|new)|another|a (?:\w+ )?(?:new|different|second|better)|"
    r"differently|the other|other|one more|yet another|some other)\b",
    r"<lead>(?:try|suppose|use|take|consider|what if|instead)\b.{0,60}\binstead\b(?! of)",
    r"<lead>instead,? (?:let|i\b|we\b|try|use|consider|of (?:that|this))",
    r"\b(?:let me|let'?s|i'll|we'll|(?:i|we) (?:can|could|should|will))\b.{0,60}\binstead\b(?! of)",
    r"(?:<lead>|<me> )(?:redo|re-?think|reconsider|revise|restart|rewind|re-?read|looking again|undo|change of plan|"
    r"new plan)\b",
    r"<lead>an? (?:better|different|other|new)(?: \w+)? "
    r"(?:approach|way|idea|method|strategy|attempt|goal|target) (?:is|would|could|might)\b",
)
ONLY_WAITS = _any(r"(?:hmm+|oh|but|no|um|hold on)?[,. ]{0,4}wait[.!, ]{0,4}")
# "Wait, let me double-check." and "Wait, is that the radius?" abandon nothing.
ONLY_DOUBTS = _any(
    r"\bwait\b.{0,20}<me> <check>",
    r"\bwait,? (?:but |so )?(?:does|do|is|are|did|what|how|which|can)\b.*\?$",
)

# --- subgoal setting --------------------------------------------------------------------------------------------------

STAGE = _any(
    r"<lead>(?:sub-?)?(?:step|goal|stage|phase|part|case) (?:\d{1,2}|one|two|three|four|[a-c])"
    r"(?: ?[:.)\-,]|$| is to\b)",
    # "first, I need to find", "next, let's calculate", "we must first determine"
    r"\b(?:first|second|third|next|then|now|to start|to begin(?: with)?|after that|before that)\b,? (?:of all,? )?"
    r"(?:<me> <find>|(?:i|we) (?:will |would |also |first )?<need> (?:<find>|<reach>))\b",
    r"\b(?:first|then|next|now|after that)\b,? (?:i|we)(?:'ll| will| can) <reach> (?:the|how)\b",
    r"<lead>(?:first|next|then|second|third|now)(?: of all)?,? (?:<find>\b|<reach> \d)",
    r"\b(?:i|we|let me|let us|let'?s)(?: (?:will|must|should|can|need to|have to|want to))? first (?:<need> )?<find>\b",
    r"<i> first <need> <reach>\b",
    r"<i> (?:need|have) to <find> first\b",
    r"<me> <find> .{1,80}\bfirst\b",
    r"\b<need> (?:<find>|know)\b.{0,60}\bbefore\b",
    r"\b(?:let me|let us|let'?s)(?: also| now)? <find> (?:the|how|what|out|each|its|his|her|their|this)\b",
    r"\blet'?s get (?:the|how)\b",
    r"\b(?:gotta|got to) (?:find|get|make)\b",
    # a number to reach
    r"\b(?:i want|i'd like|i would like|i'll try|i will try|let me try|let'?s try|try|trying|aim|aiming)"
    r"(?: for| to| at)?(?: get| make| reach| have| build| form| find| create| obtain| get close| come close)(?: to)?"
    r"(?: a| an| something| exactly| about| near| around| close to)? \d",
    r"\bfirst,? i want \d",
    r"\blook(?:ing)? for (?:a |an )?\d",
    r"\bis what (?:i'm|we're|i am|we are) (?:after|looking for)\b",
    r"(?:<lead>|<me> )aim(?:ing)? (?:for|to|at)\b",
    r"\bif (?:i|we) (?:can|could) (?:get|make|find|build|form|reach)\b",
    r"\bif (?:i|we) (?:make|get|had|have) (?:a |an )?\d",
    r"<i>(?:'d| would) like (?:the|this|it) \w+(?: \w+)? to\b",
    r"<i>(?:'d| would) like to have \d+ because\b",
    # the word for a goal
    r"(?<!his )(?<!her )(?<!their )(?<!your )\b(?:first|next|new|intermediate|second|smaller) "
    r"(?:sub-?)?(?:goal|target|aim)\b",
    r"\bsub-?goals?\b",
    r"<the> plan is to (?:first |then )?(?:get|make|find|calculate|work out|compute|reach)\b",
    r"\bthe (?:key|trick|idea|(?:first|next) thing)(?: here| now)? is to (?:<find>|<reach>)\b",
)
NEEDS_TO_KNOW = _any(r"<i>(?: first| also| now| still)? (?:need|have) to know\b")
PLAN = _any(
    r"\bhere(?:'s| is) <the> plan\b",
    r"\b(?:my|our) plan has\b",
    r"^plan ?:",
    r"<me> (?:break|split|divide) (?:this|it|that|the problem)\b",
    r"<me> (?:take|do|solve) (?:this|it) in (?:\d|two|three|four|several) (?:steps|parts)\b",
)

# --- backward chaining ------------------------------------------------------------------------------------------------

LINK = _any(
    # "to get 24 I need", "so I need 8 from 5 and 3"
    r"\bto (?:get|make|reach|obtain|end (?:at|up (?:with|at))|arrive at|hit|have|form)(?: to)? (?:exactly )?"
    r"(?:the <goal>|this|that|it|there|-?\d+\b(?=,|:|\.|$| (?:by|with|from|in|using|out|as|when|at|if|i|we)\b))"
    r".{0,60}<i_would> (?:need|want|require|must have)\b",
    r"<i_would> need (?:to (?:get|make|find|have) )?(?:a |an |another )?\d+,? (?:from|out of|using|with|of) (?:the )?"
    r"(?:\d|other|rest|remaining|what|it|them)",
    r"(?:=|\bis\b|\bgives\b) ?-?\d+[^=]{0,12}<i_would> need (?:to (?:get|make|reach|find|have) )?(?:a |an |another )?"
    r"\d+(?:[,.]|$| (?:from|out|using|with|and))",
    r"(?:<lead>|[,:] )(?:since |because |as |but |and )?\d+ (?:=|is) \(?\d+ ?[-+*/] ?\(?\d+\)?,? .{0,80}"
    r"\b(?:if|need|make|get|give)\b",
    r"\b\d+ (?:could|might|can) (?:also |in turn |then ){0,2}(?:be|come from|be made (?:from|as|by)) "
    r"\(?\d+ ?[-+*/] ?\d",
    r"\bwhich (?:would|in turn)(?: then)? (?:needs?|requires?) (?:a |an )?\d",
    r"\b(?:rest|others?|remaining|left|numbers)(?: \w+){0,6} (?:have|has|had|must|needs?)(?: to)? "
    r"(?:give|make|be|equal|come to) \d",
    r"\bwhat (?:number )?(?:times|plus|minus|divided by|added to) \d+ (?:gives|makes|is|equals) \d",
    # the last step first
    r"\bif (?:the|my) (?:last|final) (?:step|operation|move) (?:is|was|were)\b",
    r"<lead>(?:the |my |.{0,40}, the )?(?:last|final) (?:step|operation|move|thing)(?: to \w+(?: \w+)?)? "
    r"(?:must|could|might|would|has to|may|is to be) be\b",
    r"\bif (?:i|we) (?:end|finish|close)(?: \w+)? (?:with|by|on|in)\b.{0,60}\b(?:need|must|have to|want)\b",
    r"\bbefore\b.{0,60}\bmust have (?:had|been|started|begun)\b",
    # from what is asked to what that needs
    r"\bto (?:find|know|answer|say|tell|calculate|compute|get|determine|work out|figure out)\b.{1,80}?<i>"
    r"(?: first| will| would| also)? (?:need|have|must)(?: to)? (?:first )?"
    r"(?:know|have|find|the|its|his|her|their|how|what)\b",
    r"\b(?:question|problem) (?:asks|wants|is asking)\b.{0,100}\b(?:needs?|requires?|depends?)\b",
    r"\bdepends? on\b.{0,80}\b(?:find|know|need|so)\b",
    r"\bso (?:i|we)(?: first| now| still)? need (?:to know|the|its|his|her|their|how)\b",
    r"\bfor (?:that|this),? <i_would> need\b",
    r"\bfor (?:that|this) to (?:happen|hold|be|give|equal)\b",
    r"\bif (?:i|we) (?:had|knew|could find|can find)\b.{0,60}\b(?:follow|would be|be done|could)\b",
    # a sufficient condition
    r"\bit (?:suffices|is enough|would be enough|is sufficient|would suffice) (?:to|that|if)\b",
    r"\bfor (?:this|that) it (?:is enough|suffices|is sufficient)\b",
    r"<it> (?:in turn )?(?:would )?follows? if\b",
)
SO_I_NEED = _any(r"^(?:so|then|thus|hence|therefore),? (?:i|we)(?:'d| would| will)? need\b")
FROM_THE_END = _any(
    r"(?:<lead>|<me> |\bby )(?:work|working|think|thinking|reason|reasoning|go|going|start|starting)(?: \w+)? "
    r"backwards?\b",
    r"(?:<lead>|<me> |\bby )(?:work|working) back\b(?! (?:at|in|to)\b)",
    r"(?:<lead>|<me> )(?:start|starting|begin|beginning|think|thinking|reason|reasoning|work|working)(?: \w+)? "
    r"(?:from|with|at) the (?:goal|target|end|final|question|desired|answer|result)\b(?! of the\b)",
    r"(?:<lead>|\b(?:going|working|thinking|reasoning) )in reverse\b",
)
