"""Sums of many nodes' vectors for a server that sees no single one: masks that cancel.

    terms      what a run of the protocol is about, and whom its guarantee stands against
    quantise   from updates to whole numbers modulo 2^32, with discrete noise, and back
    keys       key agreement and sealed boxes
    shares     secrets in shares, so that what a lost node would have said can be had from others
    masks      the pseudo-random vectors that are added
    messages   what goes between nodes and server
    member     what a node does, and what it refuses
    collector  what the server does
    seat       a node's place in masked rounds: from messages and updates to `member`
    unfinished what a node keeps of it between messages
    conduct    a masked round, stage by stage, from the server's side
    roster     identities of simulated nodes
    peers      those of real nodes, from files that their operators exchanged

Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS),
figure 4, with the steps that stand against a server that lies; see docs/adr/0011.
"""
