#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""fake_tailscaled.py DIRECTORY: a FAKE of tailscaled's local API at DIRECTORY/sock, for what the
real one (tests/real/advertise.sh) does not do on demand. DIRECTORY/fault names what is wrong
with the next answers (none: nothing), DIRECTORY/prefs is AdvertiseRoutes, DIRECTORY/edits gets
a line for each PATCH, DIRECTORY/status is what it says of the tailnet. A PUT is a list that somebody else sets."""
import http.server, json, os, queue, socketserver, sys, threading

where = sys.argv[-1]
buses, lock = [], threading.Lock()


def fault():
    try:
        return open(where + "/fault").read().strip()
    except OSError:
        return ""


def prefs():
    return {"WantRunning": True, "AdvertiseRoutes": json.load(open(where + "/prefs")), "NoSNAT": True}


def change(routes):
    with lock:
        with open(where + "/prefs.new", "w") as f:
            json.dump(routes, f)
        os.rename(where + "/prefs.new", where + "/prefs")
        for bus in buses:
            bus.put(prefs())


class Local(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    address_string = lambda self: "local"
    log_message = lambda *_: None

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def notify(self, p, net_map=None):
        self.chunk(json.dumps({"Version": "1", "State": None, "Prefs": p, "NetMap": net_map}).encode() + b"\n")

    def answer(self, code, body, kind="application/json"):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def wrong(self):
        """Whether the request came to nothing."""
        now, patch = fault(), self.command == "PATCH"
        if now == "silent" or (now == "silent edit" and patch):
            threading.Event().wait(60)
        elif now == "garbage":
            self.wfile.write(b"\x15\x03 this is not HTTP\n")
        elif now == "no json":
            self.answer(200, b"<html>")
        elif now == "denied" or (now == "denied edit" and patch):
            self.answer(403, b"access denied\n", "text/plain")
        else:
            return False
        self.close_connection = True
        return True

    def do_GET(self):
        assert self.headers["Host"] == "local-tailscaled.sock"
        if self.wrong():
            return
        if not self.path.startswith("/localapi/v0/watch-ipn-bus?mask="):
            return self.answer(200, json.dumps(prefs() if self.path.endswith("/prefs") else
                                               json.load(open(where + "/status")), indent="\t").encode())
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        bus = queue.Queue()
        with lock:
            bus.put(prefs())
            buses.append(bus)
        if fault() == "huge":  # longer and deeper than anything we keep
            self.notify(None, {"Peers": [{"Name": "x" * 1000, "Prefs": {}}] * 6000})
            self.notify(None, [[[[]]]])
        while True:
            self.notify(bus.get())
            if fault() == "ends":
                self.close_connection = True
                break

    def do_PATCH(self):
        edit = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(where + "/edits", "a") as f:
            print(json.dumps(edit), file=f)
        if self.wrong():
            return
        assert edit.keys() == {"AdvertiseRoutesSet", "AdvertiseRoutes"} and edit["AdvertiseRoutesSet"]
        change(edit["AdvertiseRoutes"])
        if fault() == "insists":
            change(["192.168.7.0/24"])
        self.answer(200, json.dumps(prefs(), indent="\t").encode())


    def do_PUT(self):
        change(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(200, b"{}")


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


change([])
server = Server(where + "/sock", Local)
print("ready", flush=True)
server.serve_forever()
