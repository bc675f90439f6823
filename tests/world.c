/* SPDX-License-Identifier: MIT
 *
 * world.c: what the demo and the namespace tests need around tail_lifter.
 *
 *   world tun NETNS/NAME NETNS/NAME   a TUN in each namespace, what goes into one comes
 *                                     out of the other, offloads and all: the tailnet
 *   world pod NAME PORT               answers HTTP, lines by TCP, and UDP: with its name
 *                                     and the address of whoever asked; lines and UDP
 *                                     also with "port PORT " and what was asked
 *
 * Both stay until they are killed or whoever started them is gone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* A TUN as tailscaled makes it: bare IP, with offloads. */
static int tun_open(const char *where)
{
	struct ifreq ifr = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
	const char *name = strchr(where, '/');
	char path[256];
	int ns, fd;

	if (!name++)
		errx(1, "not NETNS/NAME: %s", where);
	snprintf(path, sizeof(path), "/run/netns/%.*s", (int)(name - 1 - where), where);
	ns = open(path, O_RDONLY);
	if (ns < 0 || setns(ns, CLONE_NEWNET))
		err(1, "%s", path);
	close(ns);
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) ||
	    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
		err(1, "/dev/net/tun: %s", name);
	return fd;
}

static void carry(int from, int to)
{
	static char packet[65536 + 64];
	ssize_t n;

	for (int i = 0; i < 64 && (n = read(from, packet, sizeof(packet))) > 0; i++)
		if (write(to, packet, n) < 0 && errno != EIO && errno != EAGAIN && errno != EINVAL)
			err(1, "write to a TUN"); /* EIO: it is not up yet; then it is as if lost */
}

static int tun(char **arg)
{
	struct pollfd p[2] = { { .events = POLLIN }, { .events = POLLIN } };

	p[0].fd = tun_open(arg[0]);
	p[1].fd = tun_open(arg[1]);
	puts("ready");
	fflush(stdout);
	while (poll(p, 2, -1) >= 0)
		for (int i = 0; i < 2; i++)
			if (p[i].revents)
				carry(p[i].fd, p[!i].fd);
	return 1;
}

static int listen_on(int type, int port)
{
	struct sockaddr_in6 me = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, type, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || bind(fd, (struct sockaddr *)&me, sizeof(me)) ||
	    (type == SOCK_STREAM && listen(fd, 1024)))
		err(1, "port %d", port);
	return fd;
}

/* "NAME answers ADDRESS"; asked something, also "port PORT " and that. */
static int answer(char text[4096], const char *name, const struct sockaddr_in6 *who, const char *asked, size_t n)
{
	char addr[INET6_ADDRSTRLEN];
	int len;

	inet_ntop(AF_INET6, &who->sin6_addr, addr, sizeof(addr));
	len = snprintf(text, 4096, "%s answers %s\n", name, strncmp(addr, "::ffff:", 7) ? addr : addr + 7);
	if (asked)
		len += snprintf(text + len, 4096 - len, "port %d %.*s", ntohs(who->sin6_port), (int)n, asked);
	return len;
}

/* Each line is answered; the longer ones, which are there to be long, by their end. */
static void serve_lines(int fd, const char *name, const struct sockaddr_in6 *who, char *ask, ssize_t n)
{
	char text[4096];
	ssize_t tail;

	do {
		alarm(30);
		tail = n < 64 ? n : 64;
		if (ask[n - 1] == '\n')
			send(fd, text, answer(text, name, who, ask + n - tail, tail), 0);
	} while ((n = read(fd, ask, 65536)) > 0);
}

static void serve_tcp(int listener, const char *name)
{
	struct sockaddr_in6 who;
	socklen_t len = sizeof(who);
	int fd = accept(listener, (struct sockaddr *)&who, &len);
	static char ask[65536], text[4096];
	ssize_t n;

	if (fd < 0 || fork()) {
		close(fd);
		return;
	}
	close(listener);
	alarm(30); /* a client may think for that long */
	n = read(fd, ask, sizeof(ask));
	if (n > 4 && !memcmp(ask, "GET ", 4))
		dprintf(fd, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", answer(text, name, &who, NULL, 0), text);
	else if (n > 0)
		serve_lines(fd, name, &who, ask, n);
	shutdown(fd, SHUT_WR);
	while (read(fd, ask, sizeof(ask)) > 0)
		;
	_exit(0);
}

static void serve_udp(int fd, const char *name)
{
	struct sockaddr_in6 who;
	socklen_t len = sizeof(who);
	char text[4096], in[3500];
	ssize_t n = recvfrom(fd, in, sizeof(in), 0, (struct sockaddr *)&who, &len);

	if (n >= 0)
		sendto(fd, text, answer(text, name, &who, in, n), 0, (struct sockaddr *)&who, len);
}

static int pod(char **arg)
{
	struct pollfd p[2] = { { .fd = listen_on(SOCK_STREAM, atoi(arg[1])), .events = POLLIN },
			       { .fd = listen_on(SOCK_DGRAM, atoi(arg[1])), .events = POLLIN } };

	puts("ready");
	fflush(stdout);
	while (poll(p, 2, -1) > 0) {
		if (p[0].revents)
			serve_tcp(p[0].fd, arg[0]);
		if (p[1].revents)
			serve_udp(p[1].fd, arg[0]);
	}
	return 1;
}

int main(int argc, char **argv)
{
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);
	if (argc == 4 && !strcmp(argv[1], "tun"))
		return tun(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "pod"))
		return pod(argv + 2);
	fprintf(stderr, "usage: world tun NETNS/NAME NETNS/NAME | world pod NAME PORT\n");
	return 2;
}
