//go:build e2e

package k8s

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Programs as Debian has them, as pods. What they say of their speed goes to the log, and nothing is demanded of it.

// server is a Deployment of one pod that a shell script starts, and a Service in front of it.
func server(name, start string, port int, container, pod string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {selector: {app: %[1]s}, ports: [{port: %[3]d}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  strategy: {type: Recreate}
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 60
      containers:
      - name: main
        image: %[2]s
        command:
        - sh
        - -c
        - |
%[4]s
        readinessProbe: {tcpSocket: {port: %[3]d}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 300}
%[5]s
%[6]s
`, name, programs, port, indent(10, start), indent(8, container), indent(6, pod))
}

// client is a pod of the same image that waits for commands.
func (s *space) client(t *testing.T) {
	t.Helper()
	s.apply(t, strings.Replace(sleeper("client", "", ""), box, programs, 1))
	s.ready(t, "client")
}

func TestNginx(t *testing.T) {
	s := newSpace(t)
	s.apply(t, server("nginx", "exec nginx -g 'daemon off;'", 80, "", ""))
	s.available(t, "nginx")
	s.client(t)
	url := "http://" + s.serviceIP(t, "nginx") + "/"
	s.until(t, "nginx answers", func() bool {
		return strings.Contains(s.try("exec", "client", "--", "curl", "-s", url).stdout, "Welcome to nginx!")
	})
	out := s.sh(t, "client", "wrk -t 2 -c 16 -d 5s --timeout 60s "+url)
	t.Log(out)
	if m := regexp.MustCompile(`(\d+) requests in`).FindStringSubmatch(out); m == nil || m[1] == "0" ||
		strings.Contains(out, "Non-2xx") || strings.Contains(out, "Socket errors") {
		t.Error("wrk had errors")
	}
}

// A database outlives its pod, because its claim does.
func TestPostgres(t *testing.T) {
	s := newSpace(t)
	s.claim(t, corev1.PersistentVolumeFilesystem, fmt.Sprintf("hostPath: {path: %s, type: DirectoryOrCreate}", s.hostDir(t)))
	s.apply(t, server("postgres", `
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
as() { setpriv --reuid postgres --regid postgres --clear-groups -- "$@"; }
install -d -o postgres -g postgres -m 700 /v/data
test -e /v/data/PG_VERSION || as initdb -D /v/data --auth trust >/dev/null
exec setpriv --reuid postgres --regid postgres --clear-groups -- postgres -D /v/data -k /tmp -c listen_addresses='*'
`, 5432, "volumeMounts: [{name: v, mountPath: /v}]\nresources: {limits: {memory: 512Mi}}", "volumes: [{name: v, persistentVolumeClaim: {claimName: claim}}]"))
	const psql = "psql -h /tmp -U postgres -tAc "
	// Its port is open before it answers, and that is what makes it available.
	pod := func() string {
		s.available(t, "postgres")
		name := s.running(t, "app=postgres")[0]
		s.until(t, "postgres answers", func() bool { return s.try("exec", name, "--", "sh", "-c", psql+"'select 1'").stdout == "1\n" })
		return name
	}
	first := pod()
	s.sh(t, first, "pgbench -h /tmp -U postgres -q -i -s 1 postgres 2>&1")
	t.Log(s.sh(t, first, "pgbench -h /tmp -U postgres -c 2 -T 5 postgres 2>&1"))
	s.sh(t, first, psql+"'create table kept as select generate_series(1, 1000) as n'")
	s.kubectl(t, "delete", "pod", first, "--timeout", patience().String())
	second := pod()
	if second == first {
		t.Fatal("the pod is the same")
	}
	s.want(t, second, psql+"'select sum(n) from kept'; "+psql+"'select count(*) from pgbench_accounts'; "+psql+"'select count(*) > 0 from pgbench_history'",
		"500500\n100000\nt")
}

func TestRedis(t *testing.T) {
	s := newSpace(t)
	s.apply(t, server("redis", "exec redis-server --save '' --protected-mode no", 6379, "", ""))
	s.available(t, "redis")
	s.client(t)
	ip := s.serviceIP(t, "redis")
	s.until(t, "redis answers", func() bool { return s.try("exec", "client", "--", "redis-cli", "-h", ip, "ping").stdout == "PONG\n" })
	// It shows how far it is, each time on the same line.
	t.Log(s.sh(t, "client", "redis-benchmark -h "+ip+" -n 5000 -c 10 -q -t set,get,lpush | tr '\\r' '\\n' | grep 'per second'"))
	s.want(t, "client", "redis-cli -h "+ip+" llen mylist", "5000")
}

// A program asks the API server about its own pod, with its service account's token.
func TestServiceAccount(t *testing.T) {
	s := newSpace(t)
	s.kubectl(t, "create", "role", "reader", "--verb=get", "--resource=pods")
	s.kubectl(t, "create", "rolebinding", "reader", "--role=reader", "--serviceaccount="+s.name+":default")
	const ask = `
import json, os, ssl, urllib.request
d = '/var/run/secrets/kubernetes.io/serviceaccount/'
url = 'https://%s:%s/api/v1/namespaces/%s/' % (os.environ['KUBERNETES_SERVICE_HOST'], os.environ['KUBERNETES_SERVICE_PORT'], open(d + 'namespace').read())
def get(what):
    r = urllib.request.Request(url + what, headers={'Authorization': 'Bearer ' + open(d + 'token').read()})
    return json.load(urllib.request.urlopen(r, context=ssl.create_default_context(cafile=d + 'ca.crt')))
print(get('pods/' + os.environ['HOSTNAME'])['spec']['serviceAccountName'])
try:
    get('secrets')
except urllib.error.HTTPError as e:
    print(e.code)
`
	s.apply(t, strings.Replace(script("p", "python3 -c \"$PROGRAM\"", "env:\n- name: PROGRAM\n  value: |\n"+indent(4, ask), ""), box, programs, 1))
	if state := s.ended(t, "p"); state.ExitCode != 0 {
		t.Errorf("the program: %v", state)
	}
	if got := s.logs(t, "p"); got != "default\n403\n" {
		t.Errorf("the program says %q", got)
	}
}
