#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""pod.py: what runs in the pods, and its counterpart for UDP.

  pod.py serve NAME FILE     HTTP on port 8080 and UDP echo on port 9090, both families.
                             GET /      "NAME CLIENT-ADDRESS"
                             GET /file  FILE
                             PUT        "NAME CLIENT-ADDRESS SHA256-OF-THE-BODY"
                             UDP        "NAME CLIENT-ADDRESS PAYLOAD", PAYLOAD cut to make
                                        the answer as long as the question, if that is longer;
                                        asked for a "burst", a burst
  pod.py ask ADDRESS PORT FROM N [LENGTH]
                             ask by UDP from N ports, FROM and those above it, one after
                             another: one answer a line; LENGTH is the payload's. Exit 1
                             if one stays away.
  pod.py burst ADDRESS PORT up|down
                             40 datagrams in one go, cut up by the kernel or by whoever can
                             do it later (UDP_SEGMENT): each is answered; or the pod sends as
                             many. Exit 1 if after some tries one stays away or is not as sent.
"""
import hashlib
import http.server
import shutil
import socket
import sys
import threading


def plain(address):
    return address[7:] if address.startswith("::ffff:") else address


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self):  # no look-up of our own name, which waits for a DNS that is not there
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, *words):
        body = (" ".join((name, plain(self.client_address[0])) + words) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path != "/file":
            return self.answer()
        with open(file, "rb") as source:
            self.send_response(200)
            self.end_headers()
            shutil.copyfileobj(source, self.wfile)

    def do_PUT(self):
        seen, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            seen.update(piece)
            left -= len(piece)
        self.answer(seen.hexdigest())

    def log_message(self, *_):
        pass


def echo():
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    s.bind(("::", 9090))
    while True:
        data, peer = s.recvfrom(65536)
        if data == b"burst":
            send_burst(s, peer)
            continue
        head = f"{name} {plain(peer[0])} ".encode()
        s.sendto((head + data)[: max(len(data), len(head))], peer)


SIZE, N_PARTS = 1100, 40


def burst():
    """The parts: each says which it is, and is as long as the others."""
    return [b"part %03d " % i + bytes((i + k) % 251 for k in range(SIZE - 9)) for i in range(N_PARTS)]


def send_burst(s, to):
    s.sendmsg([b"".join(burst())], [(socket.IPPROTO_UDP, 103, SIZE.to_bytes(2, sys.byteorder))], 0, to)  # UDP_SEGMENT


def ask_burst(address, port, way):
    family = socket.getaddrinfo(address, None)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        s.settimeout(1)
        missing = set(burst())
        for _ in range(10):  # what is lost is asked for again
            if way == "up":
                send_burst(s, (address, port))
            else:
                s.sendto(b"burst", (address, port))
            try:
                while missing:
                    got, _ = s.recvfrom(65536)
                    part = got.split(b" ", 2)[2] if way == "up" else got  # "NAME CLIENT PART", cut off
                    if len(got) != SIZE or not any(p.startswith(part) for p in burst()):
                        sys.exit(f"{len(got)} bytes: {got[:40]}")
                    missing = {p for p in missing if not p.startswith(part)}
                return
            except TimeoutError:
                pass
        sys.exit(f"{len(missing)} of {N_PARTS} are missing")


def ask(address, port, first, n, length=0):
    family = socket.getaddrinfo(address, None)[0][0]
    payload = bytes(range(97, 123)) * (length // 26 + 1)
    for source in range(first, first + n):
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(2)
            s.bind(("", source))
            s.connect((address, port))
            s.send(payload[:length])
            try:
                print(s.recv(65536).decode())
            except OSError as error:
                sys.exit(f"{address} port {port}: {error}")


if sys.argv[1] == "serve":
    name, file = sys.argv[2:4]
    threading.Thread(target=echo, daemon=True).start()
    Server(("::", 8080), Handler).serve_forever()
elif sys.argv[1] == "burst":
    ask_burst(sys.argv[2], int(sys.argv[3]), sys.argv[4])
else:
    ask(sys.argv[2], *map(int, sys.argv[3:]))
