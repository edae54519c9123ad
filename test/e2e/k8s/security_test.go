//go:build e2e

package k8s

import (
	"fmt"
	"testing"
)

// users: user, groups, and fsGroup, which owns the volumes.
func TestUsers(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "volumeMounts: [{name: v, mountPath: /v}]", `
securityContext: {runAsUser: 1234, runAsGroup: 2345, fsGroup: 3456, supplementalGroups: [4567], runAsNonRoot: true}
volumes: [{name: v, emptyDir: {}}]
`))
	s.ready(t, "p")
	s.want(t, "p", "id -u; id -g; id -G | tr ' ' '\\n' | sort | xargs; touch /v/f; stat -c '%u %g' /v/f; stat -c %g /v", "1234\n2345\n2345 3456 4567\n1234 3456\n3456")
	s.apply(t, sleeper("root", "securityContext: {runAsNonRoot: true}", ""))
	s.until(t, "root is refused", func() bool {
		c := s.pod(t, "root").Status.ContainerStatuses
		return len(c) == 1 && c[0].State.Waiting != nil && c[0].State.Waiting.Reason == "CreateContainerConfigError"
	})
}

func TestReadOnlyRoot(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "securityContext: {readOnlyRootFilesystem: true}\nvolumeMounts: [{name: v, mountPath: /v}]", "volumes: [{name: v, emptyDir: {}}]"))
	s.ready(t, "p")
	s.want(t, "p", "touch /f 2>/dev/null && echo written; touch /v/f && echo volume", "volume")
}

func TestCapabilities(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("default", "", ""))
	s.apply(t, sleeper("none", "securityContext: {capabilities: {drop: [ALL]}, allowPrivilegeEscalation: false}", ""))
	s.apply(t, sleeper("one", "securityContext: {capabilities: {drop: [ALL], add: [NET_ADMIN]}}", ""))
	s.apply(t, sleeper("privileged", "securityContext: {privileged: true}", ""))
	s.ready(t, "default", "none", "one", "privileged")
	const caps = "sed -n 's/^CapEff:\\t//p; s/^NoNewPrivs:\\t//p' /proc/self/status | xargs"
	s.want(t, "default", caps, "00000000a80425fb 0")
	s.want(t, "none", caps, "0000000000000000 1")
	s.want(t, "one", caps, "0000000000001000 0")
	s.want(t, "privileged", "mount -t tmpfs none /home && echo mounted", "mounted")
	s.want(t, "default", "mount -t tmpfs none /home 2>/dev/null || echo refused", "refused")
}

// seccomp: 2 is a filter. RuntimeDefault takes unshare(2) from who has no right to it; Unconfined has no filter.
func TestSeccomp(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("default", "securityContext: {seccompProfile: {type: RuntimeDefault}}", ""))
	s.apply(t, sleeper("unconfined", "securityContext: {seccompProfile: {type: Unconfined}}", ""))
	s.ready(t, "default", "unconfined")
	const mode = "sed -n 's/^Seccomp:\\t//p' /proc/self/status; unshare -U true 2>/dev/null && echo namespace || echo refused"
	s.want(t, "default", mode, "2\nrefused")
	s.want(t, "unconfined", mode, "0\nnamespace")
}

func TestSysctls(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", `securityContext: {sysctls: [{name: kernel.shm_rmid_forced, value: "1"}, {name: net.ipv4.ip_local_port_range, value: "40000 50000"}]}`))
	s.ready(t, "p")
	s.want(t, "p", "cat /proc/sys/kernel/shm_rmid_forced; xargs </proc/sys/net/ipv4/ip_local_port_range", "1\n40000 50000")
}

// A pod with users of its own: root in there is nobody outside, and its volumes are its own all the same.
func TestHostUsers(t *testing.T) {
	s := newSpace(t)
	s.kubectl(t, "create", "configmap", "c", "--from-literal=a=1")
	s.apply(t, sleeper("p", "volumeMounts: [{name: v, mountPath: /v}, {name: c, mountPath: /c}]",
		"hostUsers: false\nvolumes: [{name: v, emptyDir: {}}, {name: c, configMap: {name: c}}]"))
	s.ready(t, "p")
	s.want(t, "p", "id -u; touch /v/f; stat -c %u /v/f; cat /c/a; awk '$1 == 0 && $2 == 0 { print \"same\" }' /proc/self/uid_map", "0\n0\n1")
}

// The host's own namespaces are not to be had in a virtual machine, and the pod says so.
func TestHostNamespacesRefused(t *testing.T) {
	if runtimeClass == "" {
		t.Log("the cluster's default runtime has no virtual machine: nothing to refuse")
		return
	}
	s := newSpace(t)
	for _, what := range []string{"hostNetwork", "hostPID", "hostIPC"} {
		name := map[string]string{"hostNetwork": "network", "hostPID": "pid", "hostIPC": "ipc"}[what]
		s.apply(t, sleeper(name, "", what+": true"))
		s.until(t, what+" is refused", func() bool {
			events := s.kubectl(t, "get", "events", "--field-selector", "involvedObject.name="+name+",reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
			return events != ""
		})
		t.Log(fmt.Sprint(what, ": ", s.kubectl(t, "get", "events", "--field-selector", "involvedObject.name="+name+",reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[0].message}")))
	}
}
