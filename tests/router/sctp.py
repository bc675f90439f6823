#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""sctp.py: the beginning of an SCTP association without the kernel's SCTP, which may not be there.

  sctp.py ask ADDRESS PORT     an INIT: who answers it with an INIT-ACK, whom the pod saw, or what went wrong
  sctp.py answer 4|6 PORT      (a pod) answers each INIT to that port, its tag is what it saw: the client's port
"""
import errno
import logging
import os
import socket
import sys

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
from scapy.layers.sctp import SCTP, SCTPChunkInit, SCTPChunkInitAck  # noqa: E402

OURS = 40000 + os.getpid() % 20000


def raw_socket(family):
    return socket.socket(family, socket.SOCK_RAW, 132)


def heard(s):
    """The SCTP packet that comes, and from whom."""
    data, who = s.recvfrom(65536)
    return SCTP(data[(data[0] & 15) * 4:] if s.family == socket.AF_INET else data), who[0]


def ask(address, port):
    s = raw_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    s.settimeout(3)
    s.connect((address, 0))
    try:
        s.send(bytes(SCTP(sport=OURS, dport=int(port)) / SCTPChunkInit(init_tag=7, init_tsn=1)))
        while True:
            p, who = heard(s)
            if SCTPChunkInitAck not in p:
                continue
            if (p.sport, p.dport, p.tag, p[SCTPChunkInitAck].init_tag) != (int(port), OURS, 7, OURS):
                return f"not to us: {p.summary()}"
            return f"INIT-ACK from {who}"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


def answer(family, port):
    s = raw_socket(socket.AF_INET6 if family == "6" else socket.AF_INET)
    print("ready", flush=True)
    while True:
        p, who = heard(s)
        if SCTPChunkInit in p and p.dport == int(port):
            reply = SCTP(sport=p.dport, dport=p.sport, tag=p[SCTPChunkInit].init_tag)
            s.sendto(bytes(reply / SCTPChunkInitAck(init_tag=p.sport, init_tsn=1)), (who, 0))


if sys.argv[1] == "ask":
    print(ask(*sys.argv[2:]))
else:
    answer(*sys.argv[2:])
