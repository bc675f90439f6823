#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""wrong.py IFACE: sends packets that are right and packets that are not, made by scapy, for
`wire check` to tell apart; prints what it should count where each goes by once."""
import logging
import sys

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.all import (ICMP, IP, TCP, UDP, Ether, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6, IPv6ExtHdrDestOpt,  # noqa: E402
                       IPv6ExtHdrFragment, PadN, Raw, SCTP, SCTPChunkData, conf, fragment, fragment6)

v4, v6 = IP(src="192.0.2.7", dst="192.0.2.8"), IPv6(src="2001:db8::7", dst="2001:db8::8")
text = b"an odd number of bytes."
asked = {4: v4 / UDP(sport=7, dport=8) / text, 6: v6 / UDP(sport=7, dport=8) / text}
right = [ip / l4 / text for ip in (v4, v6, v6 / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0\0")]))
         for l4 in (TCP(sport=7, dport=8, options=[("MSS", 1200)]), UDP(sport=7, dport=8))]
right += [v4 / ICMP() / text, v6 / ICMPv6EchoRequest() / text]
errors = [v4 / ICMP(type=3, code=4) / bytes(asked[4]), v6 / ICMPv6PacketTooBig(mtu=1300) / bytes(asked[6])]
long = [fragment(v4 / UDP(sport=7, dport=8) / (b"l" * 3001), 1400),
        fragment6(v6 / IPv6ExtHdrFragment(id=7) / UDP(sport=7, dport=8) / Raw(b"l" * 3001), 1400)]


def changed(packet, at):
    """With another byte there."""
    b = bytearray(bytes(packet))
    b[at] ^= 0x55
    return bytes(b)


sent = []  # bytes, wrong, unsure, whole
for p in map(bytes, right):
    sent += [(p, 0, 0, 0), (changed(p, -1), 1, 0, 0), (p + b"!", 1, 0, 0), (p[:-1], 1, 0, 0)]
    sent += [(changed(p, 10 if p[0] >> 4 == 4 else 4), 1, 0, 0), (changed(p, 15), 1, 0, 0)]
for p in (bytes(ip / SCTP(sport=7, dport=8, tag=9) / SCTPChunkData(data=text)) for ip in (v4, v6)):
    sent += [(p, 0, 0, 0), (changed(p, -1), 1, 0, 0), (changed(p, -len(text) - 9), 1, 0, 0)]
for p in errors:
    quote = changed(asked[6 if IPv6 in p else 4], -1)  # with it the message is right, but what it quotes is not
    outer = p.copy()
    outer[ICMP if ICMP in outer else ICMPv6PacketTooBig].remove_payload()
    sent += [(bytes(p), 0, 0, 0), (changed(p, -1), 1, 0, 0), (bytes(outer / quote), 0, 1, 0)]
    if ICMP in p:
        sent.append((bytes(outer / changed(asked[4], 10)), 1, 0, 0))
for pieces in long:
    pieces = [bytes(p) for p in pieces]
    sent += [(p, 0, 0, p is pieces[-1]) for p in pieces]
    sent += [(p, 0, 0, 0) for p in pieces[:-1]] + [(changed(pieces[-1], -1), 1, 0, 1)]

s = conf.L2socket(iface=sys.argv[1])
for p, *_ in sent:
    s.send(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02", type=0x86dd if p[0] >> 4 == 6 else 0x0800) / p)
print(f"packets {len(sent)} whole {sum(w for *_, w in sent)} unsure {sum(u for _, _, u, _ in sent)} wrong {sum(w for _, w, _, _ in sent)}")
