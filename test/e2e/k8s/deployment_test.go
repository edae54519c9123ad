//go:build e2e

package k8s

import (
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
)

// A Deployment with everything an ordinary one has, behind a Service that answers to another pod.
const shop = `
apiVersion: v1
kind: ConfigMap
metadata: {name: page}
data: {index.html: "from a configMap\n"}
---
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {token: "a secret\n", word: hidden}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: web
        image: ` + web + `
        ports: [{name: http, containerPort: 80}]
        resources:
          requests: {cpu: 50m, memory: 32Mi}
          limits: {cpu: "1", memory: 128Mi}
        env:
        - {name: WORD, valueFrom: {secretKeyRef: {name: key, key: word}}}
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
        startupProbe: {httpGet: {path: /, port: http}, periodSeconds: 1, failureThreshold: 300, timeoutSeconds: 20}
        readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 2, timeoutSeconds: 20}
        livenessProbe: {exec: {command: [pidof, nginx]}, periodSeconds: 10, timeoutSeconds: 60}
        volumeMounts:
        - {name: page, mountPath: /usr/share/nginx/html, readOnly: true}
        - {name: key, mountPath: /key, readOnly: true}
        - {name: scratch, mountPath: /scratch}
      volumes:
      - {name: page, configMap: {name: page}}
      - {name: key, secret: {secretName: key, defaultMode: 0400}}
      - {name: scratch, emptyDir: {}}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec:
  selector: {app: shop}
  ports: [{port: 8080, targetPort: http}]
`

func TestDeployment(t *testing.T) {
	s := newSpace(t)
	s.apply(t, shop)
	s.available(t, "shop")
	s.apply(t, sleeper("client", "", ""))
	s.ready(t, "client")
	pods := s.running(t, "app=shop")
	if len(pods) != 2 {
		t.Fatalf("pods of two replicas: %v", pods)
	}
	for _, p := range pods {
		s.want(t, p, "cat /usr/share/nginx/html/index.html /key/token", "from a configMap\na secret")
		s.want(t, p, "stat -Lc %a /key/token; echo $WORD $POD $LIMIT", "400\nhidden "+p+" 134217728")
		s.want(t, p, "echo x >/scratch/f && cat /scratch/f", "x")
	}
	s.until(t, "the Service answers", func() bool {
		return s.try("exec", "client", "--", "wget", "-qO-", "-T", "20", "http://"+s.serviceIP(t, "shop")+":8080/").stdout == "from a configMap\n"
	})
	s.want(t, "client", "echo $SHOP_SERVICE_HOST:$SHOP_SERVICE_PORT", s.serviceIP(t, "shop")+":8080")
	// Both pods answer, each under its own address.
	for _, p := range pods {
		s.want(t, "client", "wget -qO- -T 60 http://"+s.pod(t, p).Status.PodIP+"/", "from a configMap")
	}

	s.kubectl(t, "scale", "deployment", "shop", "--replicas", "3")
	s.available(t, "shop")
	if n := len(s.running(t, "app=shop")); n != 3 {
		t.Errorf("%d pods after scaling to 3", n)
	}
	s.kubectl(t, "scale", "deployment", "shop", "--replicas", "1")
	s.until(t, "one pod is left", func() bool { return len(s.all(t, "app=shop")) == 1 })

	old := s.running(t, "app=shop")
	s.kubectl(t, "set", "env", "deployment", "shop", "VERSION=2")
	s.available(t, "shop")
	s.until(t, "the pod was replaced", func() bool {
		now := s.all(t, "app=shop")
		return len(now) == 1 && !slices.Equal(now, old)
	})
	s.want(t, s.running(t, "app=shop")[0], "echo $VERSION", "2")
	s.kubectl(t, "rollout", "undo", "deployment", "shop")
	s.available(t, "shop")
	s.until(t, "the pod is the old one again", func() bool { return len(s.all(t, "app=shop")) == 1 })
	s.want(t, s.running(t, "app=shop")[0], "echo ${VERSION:-none}", "none")

	s.kubectl(t, "delete", "deployment", "shop", "--timeout", patience().String())
	s.until(t, "all pods are gone", func() bool { return len(s.all(t, "app=shop")) == 0 })
}

// The examples of deploy/k8s, as they are.
func TestExamples(t *testing.T) {
	s := newSpace(t)
	for _, file := range []string{"example-pod.yaml", "example-web.yaml"} {
		manifest, err := os.ReadFile("../../../deploy/k8s/" + file)
		if err != nil {
			t.Fatal(err)
		}
		s.apply(t, string(manifest))
	}
	if state := s.ended(t, "own-kernel"); state.ExitCode != 0 {
		t.Errorf("own-kernel: %v", state)
	}
	if log := s.logs(t, "own-kernel"); !strings.HasPrefix(log, "Linux ") {
		t.Errorf("own-kernel says %q", log)
	}
	s.available(t, "web")
	for _, p := range s.running(t, "app=web") {
		s.want(t, p, "wget -qO- -T 60 http://"+s.serviceIP(t, "web")+"/", "<h1>From a virtual machine</h1>")
	}
}

func (s *space) serviceIP(t *testing.T, name string) string {
	t.Helper()
	service := &corev1.Service{}
	if err := s.Get(t.Context(), name, s.name, service); err != nil {
		t.Fatal(err)
	}
	return service.Spec.ClusterIP
}

// all are the names of the pods with a label, those that are on their way out too.
func (s *space) all(t *testing.T, label string) []string {
	t.Helper()
	var pods corev1.PodList
	if err := s.List(t.Context(), &pods, resources.WithLabelSelector(label)); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range pods.Items {
		names = append(names, p.Name)
	}
	return names
}
