#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""talk.py: what a client's, or a pod's, sockets are told. The pods are those of world.c.

  talk.py ask tcp|udp ADDRESS PORT [SIZE]   one question, its answer: "POD CLIENT PORT", or what went wrong
  talk.py who tcp|udp ADDRESS PORT N        as many questions, each from a port of its own: who answers them,
                                            and whom they see: "POD CLIENT, POD CLIENT"
  talk.py mtu udp ADDRESS PORT              a datagram that must not be cut up and is too long: what
                                            the socket learns, from whom; then one that fits is answered
  talk.py mtu tcp ADDRESS PORT              an upload: the path's MTU when it is through
  talk.py ttl N ADDRESS PORT                a datagram with that TTL: the error it meets, from whom
  talk.py refused ADDRESS PORT              a datagram to where nobody listens: the error, from whom
  talk.py collide N ADDRESS ADDRESS PORT    one port of ours, by TCP and by UDP, towards both at once, N rounds:
                                            as whom each is seen each time: "tcp POD CLIENT PORT POD CLIENT PORT"
                                            and the same of udp; our port is called OURS
  talk.py leave ADDRESS PORT                asks by UDP, takes one answer and is gone
  talk.py late PORT                         (a pod) answers one question, then sends more, which nobody
                                            waits for: the error, from whom
  talk.py mss IFACE PORT                    (a pod or a client) the MSS of the next SYN and SYN-ACK of PORT
  talk.py sink PORT                         (a pod) takes datagrams and answers only those that say "now"
  talk.py stream ADDRESS PORT FILE          sends to a sink until FILE is there, then asks, and again; the answer
  talk.py flows N ADDRESS:PORT...           N conversations with each, half by TCP, half by UDP. Reads
                                            commands: "round" (everybody asks once), "run SECONDS FILE"
                                            (rounds until then, or until FILE is there), "ports"; answers
                                            each with one line that begins with "ok" if each conversation
                                            is where it was. What is lost by UDP is asked again after half
                                            a second, and who waits for TCP three seconds asks again too:
                                            nudged, for only a request brings back a flow that is gone
PATIENCE, in the environment, is how many seconds it waits (8); SOURCE, from which address it asks.
An error is told as "ERRNO from OFFENDER about DESTINATION:PORT"; "its own words" if what it
quotes is what was sent.
"""
import errno
import itertools
import os
import select
import socket
import struct
import sys
import time

IP_MTU, IPV6_MTU = 14, 24
MTU_DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
HOPS = {socket.AF_INET: (socket.IPPROTO_IP, 2), socket.AF_INET6: (socket.IPPROTO_IPV6, 16)}


# A process asks from ports of its own: conntrack, and we, remember others for minutes.
OWN_PORTS = itertools.count(os.getpid() * 37)


def connected(kind, address, port, own=True):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.settimeout(float(os.environ.get("PATIENCE", 8)))
    if own:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has been closed may still wait
    # The kernel gives one port to two sockets that only connect, if to different places. Such a pair may share
    # a backend, and then no router that has forgotten them knows which of them is seen there by its own port.
    s.bind((os.environ.get("SOURCE", ""), 2000 + next(OWN_PORTS) % 30000 if own else 0))
    s.connect((address, port))
    return s


def mtu(s):
    return s.getsockopt(*((socket.IPPROTO_IPV6, IPV6_MTU) if s.family == socket.AF_INET6 else (socket.IPPROTO_IP, IP_MTU)))


def told(s, sent, patience=3000):
    """The error that lies in the socket's queue, in words; and what it says of the MTU."""
    poll = select.poll()
    poll.register(s, 0)  # POLLERR comes unasked
    if not poll.poll(patience):
        return "no error", 0
    data, control, _, about = s.recvmsg(4096, 512, socket.MSG_ERRQUEUE)
    for _, _, value in control:
        if len(value) < 16 + 16:
            continue
        number, origin, kind, code, _, info, _ = struct.unpack("=IBBBBII", value[:16])
        if origin == 1:
            offender = "here"
        elif s.family == socket.AF_INET:
            offender = socket.inet_ntop(s.family, value[20:24])
        else:
            offender = socket.inet_ntop(s.family, value[24:40])
        # of ICMPv4's quote at least eight bytes behind the IP header are sure
        own = "its own words" if data and sent.startswith(data[:len(sent)]) else f"words {data[:32]}, {len(data)} bytes"
        return f"{errno.errorcode[number]} from {offender} about {about[0]}:{about[1]}, {own}", info
    return "an error without a name", 0


def send_for_error(s, data, patience=3000):
    s.setsockopt(*RECVERR[s.family], 1)
    s.send(data)
    return told(s, data, patience)


def parse(answer):
    """b"POD answers CLIENT\\nport PORT WHAT-WAS-ASKED" -> its words"""
    pod, _, client, _, port, *asked = answer.decode().split(None, 5)
    return pod, client, int(port), "".join(asked)


def receive_answer(s):
    """From TCP, until both of its lines are there."""
    got = b""
    while got.count(b"\n") < 2:
        more = s.recv(65536)
        if not more:
            raise OSError("end of the connection")
        got += more
    return got


def ask(kind, address, port, size=10):
    try:
        s = connected(kind, address, int(port))
        question = b"x" * (int(size) - 1) + b"\n"
        s.send(question)
        try:
            answer = receive_answer(s) if kind == "tcp" else s.recv(65536)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            s.send(question)  # UDP over IPv6 tells that the path is narrower and leaves the rest to us
            answer = s.recv(65536)
        pod, client, seen, asked = parse(answer)
        if kind == "udp" and len(asked) != int(size):
            return f"{len(asked)} bytes of {size}"
        return f"{pod} {client} {seen}"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))


def who(kind, address, port, n):
    return ", ".join(sorted({ask(kind, address, port).rsplit(" ", 1)[0] for _ in range(int(n))}))


def ask_mtu(kind, address, port):
    s = connected(kind, address, int(port))
    if kind == "tcp":
        before = mtu(s)
        s.sendall(b"x" * 300000 + b"\n")
        pod = parse(receive_answer(s))[0]
        return f"{pod} mtu {before} then {mtu(s)}"
    s.setsockopt(*MTU_DISCOVER[s.family], 2)  # IP_PMTUDISC_DO
    error, learnt = send_for_error(s, b"x" * 1360)
    if not learnt:
        return error
    fits = mtu(s) - 28 - 20 * (s.family == socket.AF_INET6)
    s.send(b"y" * fits)
    asked = parse(s.recv(65536))[3]
    return f"{error}, mtu {learnt} {mtu(s)}, {'as long is answered' if len(asked) == fits else 'then cut'}"


def ask_ttl(ttl, address, port):
    s = connected("udp", address, int(port))
    s.setsockopt(*HOPS[s.family], int(ttl))
    return send_for_error(s, b"how far is it?")[0]


def ask_refused(address, port):
    return send_for_error(connected("udp", address, int(port)), b"is anybody there?")[0]


def collide(n, first, second, port):
    told = []
    for kind in "tcp", "udp":
        mine, pair = 0, []
        for address in first, second:
            s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET,
                              socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.settimeout(3)
            s.bind(("", mine))
            mine = s.getsockname()[1]
            pair.append((s, address, set()))
        for s, address, _ in pair:
            s.connect((address, int(port)))
        for i in range(int(n)):
            for k, (s, _, _) in enumerate(pair):
                s.send(b"%d of %d\n" % (i, k))
            for k, (s, _, seen) in enumerate(pair):
                *who, asked = parse(receive_answer(s) if kind == "tcp" else s.recv(4096))
                if asked != f"{i} of {k}\n":
                    return f"{kind}: {i} of {k} was answered as {asked}"
                seen.add(f"{who[0]} {who[1]} {'OURS' if who[2] == mine else who[2]}")
        told.append(" ".join((kind, *(", ".join(sorted(seen)) for *_, seen in pair))))
    return "; ".join(told)


def leave(address, port):
    s = connected("udp", address, int(port))
    s.send(b"hello\n")
    said = s.recv(4096).decode()
    return f"{said} {s.getsockname()[1]}"


def late(port):
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", int(port)))
    print("ready", flush=True)
    _, client = s.recvfrom(4096)
    mapped = client[0].startswith("::ffff:")
    # a socket of the client's own family, which hears what its errors say
    t = socket.socket(socket.AF_INET if mapped else socket.AF_INET6, socket.SOCK_DGRAM)
    name = client[0].removeprefix("::ffff:")
    s.close()
    t.bind(("", int(port)))
    t.connect((name, client[1]))
    t.send(b"once")
    for _ in range(8):  # whoever asked is gone sooner or later
        time.sleep(0.3)
        error = send_for_error(t, b"is anybody still there?", 1000)[0]
        if error != "no error":
            break
    return error.replace(f":{client[1]},", ":PORT,")


def sink(port):
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", int(port)))
    print("ready", flush=True)
    while True:
        data, client = s.recvfrom(4096)
        if data == b"now":
            s.sendto(b"heard", client)


def stream(address, port, until):
    s = connected("udp", address, int(port))
    sent = 0
    while not os.path.exists(until):
        s.send(b"on and on")
        sent += 1
        time.sleep(0.02)
    s.settimeout(0.3)
    for _ in range(10):  # once a second a flow looks after its other half
        s.send(b"now")
        try:
            return f"{s.recv(100).decode()} {'all the while' if sent > 20 else 'too soon'}"
        except TimeoutError:
            pass
    return "not heard"


def mss(iface, port):
    """Prints MSS of SYN and of SYN-ACK on the wire as they pass the interface, incoming and outgoing."""
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    s.bind((iface, 3))
    s.settimeout(5)
    print("ready", flush=True)
    found = {}
    while len(found) < 2:
        p = s.recv(65536)
        if p[0] >> 4 == 4 and p[9] == 6:
            t = p[(p[0] & 15) * 4:]
        elif p[0] >> 4 == 6 and p[6] == 6:
            t = p[40:]
        else:
            continue
        if int(port) not in struct.unpack("!HH", t[:4]) or not t[13] & 2:
            continue
        at = 20
        while at < (t[12] >> 4) * 4:
            if t[at] == 2:
                found["SYN-ACK" if t[13] & 16 else "SYN"] = struct.unpack("!H", t[at + 2:at + 4])[0]
                break
            at += 1 if t[at] == 1 else t[at + 1] if t[at] else 60
    return f"SYN {found['SYN']} SYN-ACK {found['SYN-ACK']}"


class Flow:
    def __init__(self, kind, to):
        address, port = to.rsplit(":", 1)
        self.kind, self.to, self.where, self.broken = kind, to, None, None
        self.number = 0
        self.got = b""
        self.s = connected(kind, address.strip("[]"), int(port), own=False)
        self.s.setblocking(False)
        self.answered = True

    def name(self):
        return f"{self.kind} {self.s.getsockname()[1]} to {self.to}"

    def ask(self, again=False):
        if self.broken:
            return
        if not again:
            self.number += 1
        self.answered = False
        self.sent = time.monotonic()
        try:
            self.s.send(b"%d\n" % self.number)
        except OSError as error:
            self.failed(error)

    def failed(self, error):
        # UDP may hear of a way that is not there for a moment, it asks again
        if self.kind == "tcp" and not isinstance(error, BlockingIOError):
            self.broken = str(error)

    def hear(self):
        try:
            got = self.s.recv(65536)
        except OSError as error:
            return self.failed(error)
        if self.kind == "udp":
            return self.judge(got)
        if not got:
            self.broken = "end of the connection"
        self.got += got
        while self.got.count(b"\n") >= 2 and not self.broken:  # two lines each
            answer = self.got.split(b"\n", 2)
            self.got = answer.pop()
            self.judge(b"\n".join(answer))

    def judge(self, answer):
        pod, client, port, asked = parse(answer)
        self.where = self.where or (pod, client, port)
        if (pod, client, port) != self.where:
            self.broken = f"{' '.join(map(str, self.where))} became {pod} {client} {port}"
        elif int(asked) > self.number:
            self.broken = f"an answer to what was never asked: {asked}"
        elif int(asked) == self.number:  # else a late one to what was asked twice
            self.answered = True


class Flows:
    def __init__(self, n, specs):
        self.flows = [Flow("udp" if i % 2 else "tcp", to) for to in specs for i in range(n)]
        self.poll = select.epoll()
        self.by_fd = {f.s.fileno(): f for f in self.flows}
        for fd in self.by_fd:
            self.poll.register(fd, select.EPOLLIN)
        self.stall = 0  # the longest that an answer took
        self.rounds = self.nudged = 0

    def hear(self, seconds):
        for fd, _ in self.poll.poll(seconds):
            flow = self.by_fd[fd]
            flow.hear()
            if flow.broken:
                self.poll.unregister(fd)
            elif flow.answered:
                self.stall = max(self.stall, time.monotonic() - flow.sent)

    def round(self, patience=8.0, nudges=1):
        for flow in self.flows:
            flow.ask()
        now = time.monotonic()
        end, again, nudge = now + patience, now + 0.5, now + 3
        while time.monotonic() < end and (waiting := [f for f in self.flows if not f.answered and not f.broken]):
            self.hear(0.05)
            if time.monotonic() > again:
                again += 0.5
                for flow in waiting:
                    if flow.kind == "udp" and not flow.answered:
                        flow.ask(again=True)
            if nudges and time.monotonic() > nudge:
                nudge += 3
                nudges -= 1
                for flow in waiting:
                    if flow.kind == "tcp" and not flow.answered:
                        self.nudged += 1
                        flow.ask(again=True)
        for flow in self.flows:
            if not flow.answered and not flow.broken:
                flow.broken = "no answer"
        self.rounds += 1

    def say(self):
        broken = [f"{f.name()}: {f.broken}" for f in self.flows if f.broken]
        print(f"{'not ok' if broken else 'ok'}: {len(self.flows)} conversations, {len(broken)} broken, {self.nudged} nudged, "
              f"{self.rounds} rounds, longest wait {self.stall * 1000:.0f} ms", *broken[:5], sep="; ", flush=True)

    def obey(self):
        for line in sys.stdin:
            command, *args = line.split()
            if command == "round":
                self.round()
                self.say()
            elif command == "run":
                self.stall = self.rounds = self.nudged = 0
                end = time.monotonic() + float(args[0])
                while time.monotonic() < end and not os.path.exists(args[1]):
                    self.round(30.0, 9)  # how long a flood takes, in which nothing may get through, the machine says
                    time.sleep(0.05)
                self.say()
            elif command == "ports":
                print(" ".join(f"{f.where[1]} {f.where[2]}" for f in self.flows), flush=True)


def main(command, *args):
    if command == "flows":
        flows = Flows(int(args[0]), args[1:])
        print("ready", flush=True)
        return flows.obey()
    do = {"ask": ask, "who": who, "mtu": ask_mtu, "ttl": ask_ttl, "refused": ask_refused, "collide": collide, "leave": leave,
          "late": late, "mss": mss,
          "sink": sink, "stream": stream}[command]
    print(do(*args))


main(*sys.argv[1:])
