# SPDX-License-Identifier: MIT
"""short.py IFACE: makes a TUN of that name; when a line comes by stdin, writes into it the first
1 to 60 bytes of many packets for a service, and the packets, and prints how many were taken. Run
by tests/netns: BPF_PROG_TEST_RUN, by which the packet layer works, takes none below 14 bytes."""
import fcntl
import logging
import os
import struct
import sys

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.all import (ICMP, IP, TCP, UDP, ICMPv6DestUnreach, ICMPv6EchoRequest, IPOption_NOP, IPv6, IPv6ExtHdrDestOpt,  # noqa: E402
                       IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, raw)

TUNSETIFF, IFF_TUN = 0x400454CA, 1  # with the four bytes in front that say which protocol it is

tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", sys.argv[1].encode(), IFF_TUN))
print("ready", flush=True)
sys.stdin.readline()

v4, v6 = IP(src="100.64.0.77", dst="10.43.0.10"), IPv6(src="fd7a::77", dst="fd43::10")
whole = [ip / l4 for ip in (v4, v6, IP(src=v4.src, dst=v4.dst, options=[IPOption_NOP()] * 4), v6 / IPv6ExtHdrDestOpt(),
                            v6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt())
         for port in (80, 81)
         for l4 in (TCP(sport=7, dport=port, options=[("MSS", 1460)]), UDP(sport=7, dport=port) / b"hello")]
whole += [v4 / ICMP() / b"ping", v6 / ICMPv6EchoRequest(data=b"ping")]
whole += [v4 / ICMP(type=3, code=3) / IP(src=v4.dst, dst=v4.src) / UDP(sport=80, dport=8),
          v6 / ICMPv6DestUnreach() / IPv6(src=v6.dst, dst=v6.src) / UDP(sport=80, dport=8)]
whole += [IP(src=v4.src, dst=v4.dst, proto=47) / b"GRE, perhaps", IPv6(src=v6.src, dst=v6.dst, nh=47) / b"GRE, perhaps"]
for more, offset in (0, 3), (1, 0):  # the first part comes last
    whole.append(IP(src=v4.src, dst=v4.dst, id=7, flags=more, frag=offset) / UDP(sport=7, dport=80) / (b"x" * 16))
    whole.append(v6 / IPv6ExtHdrFragment(id=7, m=more, offset=offset) / UDP(sport=7, dport=80) / (b"x" * 16))
written = 0
for packet in map(raw, whole):
    for ethertype in 0x0800, 0x86DD, 0x1234:
        for n in *range(1, 61), len(packet):
            written += os.write(tun, struct.pack("!HH", 0, ethertype) + packet[:n]) > 0
print(written, flush=True)
sys.stdin.readline()
