// SPDX-License-Identifier: MIT
/* guest.c: what the tests inside a virtual machine need and busybox cannot.
 *
 *   guest whole NAME           from now on no checksum is left to this interface
 *   guest clsact NAME          gives an interface a clsact qdisc, as others do
 *   guest ask tcp|udp ADDRESS PORT
 *                              says hello; the first line of the answer, or why there is none
 *   guest only CAPS COMMAND... runs it as root with those capabilities alone (BPF,NET_ADMIN)
 *   guest programs             a line per loaded tc program: name, bytes of machine code
 *                              (0: no JIT)
 *   guest walk                 loads all of ours; a line each: name, instructions, instructions
 *                              walked by the verifier
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <linux/capability.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include "tail_lifter.skel.h"

enum { LOG_STATS = 4, LOG_ROOM = 4096, MAX_PROGRAMS = 16 };

static int cmd_clsact(char **arg)
{
	DECLARE_LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = if_nametoindex(arg[0]),
			    .attach_point = BPF_TC_INGRESS | BPF_TC_EGRESS);
	int r = bpf_tc_hook_create(&hook);

	if (r)
		errx(1, "clsact at %s: %s", arg[0], strerror(-r));
	return 0;
}

static int cmd_whole(char **arg)
{
	struct ethtool_value off = { .cmd = ETHTOOL_STXCSUM };
	struct ifreq ifr = { .ifr_data = (char *)&off };
	int any = socket(AF_INET, SOCK_DGRAM, 0);

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", arg[0]);
	if (ioctl(any, SIOCETHTOOL, &ifr))
		err(1, "%s", arg[0]);
	return 0;
}

static int cmd_ask(char **arg)
{
	struct addrinfo hint = { .ai_flags = AI_NUMERICHOST, .ai_socktype = strcmp(arg[0], "tcp") ? SOCK_DGRAM : SOCK_STREAM }, *to;
	struct timeval patience = { .tv_sec = 10 };
	char said[512] = "";
	ssize_t n = -1;
	int fd;

	if (getaddrinfo(arg[1], arg[2], &hint, &to))
		errx(2, "not an address and a port: %s %s", arg[1], arg[2]);
	fd = socket(to->ai_family, to->ai_socktype, 0);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (!connect(fd, to->ai_addr, to->ai_addrlen) && send(fd, "hello\n", 6, 0) == 6)
		n = recv(fd, said, sizeof(said) - 1, 0);
	printf("%.*s\n", n < 0 ? 99 : (int)strcspn(said, "\n"), n < 0 ? strerror(errno) : said);
	return 0;
}

/* What leaves the bounding set is lost with the next exec, to root too. */
static int cmd_only(char **arg)
{
	static const struct {
		const char *name;
		int cap;
	} known[] = { { "BPF", CAP_BPF }, { "NET_ADMIN", CAP_NET_ADMIN }, { "PERFMON", CAP_PERFMON } };
	unsigned long long keep = 0;

	for (char *name = strtok(arg[0], ","); name; name = strtok(NULL, ",")) {
		size_t i = 0;

		while (i < sizeof(known) / sizeof(*known) && strcmp(known[i].name, name))
			i++;
		if (i == sizeof(known) / sizeof(*known))
			errx(2, "no capability known as %s", name);
		keep |= 1ULL << known[i].cap;
	}
	for (int cap = 0; cap <= CAP_LAST_CAP; cap++)
		if (!(keep >> cap & 1))
			prctl(PR_CAPBSET_DROP, cap); /* an old kernel may not know the last ones */
	execvp(arg[1], arg + 1);
	err(2, "%s", arg[1]);
}

static int cmd_programs(char **arg)
{
	(void)arg;
	for (__u32 id = 0; !bpf_prog_get_next_id(id, &id);) {
		struct bpf_prog_info info = { 0 };
		__u32 len = sizeof(info);
		int fd = bpf_prog_get_fd_by_id(id);

		if (fd < 0)
			continue; /* just gone */
		if (!bpf_prog_get_info_by_fd(fd, &info, &len) && info.type == BPF_PROG_TYPE_SCHED_CLS)
			printf("%s %u\n", info.name, info.jited_prog_len);
		close(fd);
	}
	return 0;
}

static int cmd_walk(char **arg)
{
	static char log[MAX_PROGRAMS][LOG_ROOM];
	struct tail_lifter *bpf = tail_lifter__open();
	struct bpf_program *p;
	struct timespec tick;
	int i = 0, r;

	(void)arg;
	if (!bpf)
		err(1, "the BPF object");
	clock_getres(CLOCK_MONOTONIC_COARSE, &tick);
	bpf->rodata->tl_hz = (1000000000 + tick.tv_nsec / 2) / tick.tv_nsec; /* as the agent does */
	bpf_object__for_each_program(p, bpf->obj) {
		bpf_program__set_log_level(p, LOG_STATS);
		bpf_program__set_log_buf(p, log[i++ % MAX_PROGRAMS], LOG_ROOM);
	}
	r = tail_lifter__load(bpf);
	i = 0;
	bpf_object__for_each_program(p, bpf->obj) {
		const char *said = log[i++ % MAX_PROGRAMS], *at = strstr(said, "processed ");
		struct bpf_prog_info info = { 0 };
		__u32 len = sizeof(info);

		if (r)
			fputs(said, stderr);
		else if (bpf_prog_get_info_by_fd(bpf_program__fd(p), &info, &len))
			err(1, "%s", bpf_program__name(p));
		else
			printf("%s %u %d\n", bpf_program__name(p), info.xlated_prog_len / 8,
			       at ? atoi(at + strlen("processed ")) : 0);
	}
	tail_lifter__destroy(bpf);
	return r != 0;
}

static int quiet(enum libbpf_print_level level, const char *format, va_list args)
{
	(void)level, (void)format, (void)args;
	return 0;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *word;
		int n_args; /* negative: so many or more */
		int (*run)(char **arg);
	} command[] = {
		{ "whole", 1, cmd_whole }, { "clsact", 1, cmd_clsact }, { "ask", 3, cmd_ask },
		{ "only", -2, cmd_only },  { "walk", 0, cmd_walk },	{ "programs", 0, cmd_programs },
	};

	libbpf_set_print(quiet);
	for (size_t i = 0; argc > 1 && i < sizeof(command) / sizeof(*command); i++)
		if (!strcmp(argv[1], command[i].word) &&
		    (command[i].n_args < 0 ? argc >= 2 - command[i].n_args : argc == 2 + command[i].n_args))
			return command[i].run(argv + 2);
	errx(2, "usage: see the head of guest.c");
}
