//go:build e2e

package k8s

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// What the API changes of a configMap, a secret and a projected volume arrives in the container that runs, whole.
func TestLiveUpdate(t *testing.T) {
	s := newSpace(t)
	s.kubectl(t, "create", "configmap", "c", "--from-literal=a=1")
	s.kubectl(t, "create", "secret", "generic", "k", "--from-literal=b=1")
	s.apply(t, sleeper("p", `
volumeMounts:
- {name: c, mountPath: /c}
- {name: k, mountPath: /k}
- {name: all, mountPath: /all}
- {name: c, mountPath: /one, subPath: a}
`, `
volumes:
- {name: c, configMap: {name: c}}
- {name: k, secret: {secretName: k}}
- name: all
  projected:
    sources:
    - {configMap: {name: c, items: [{key: a, path: dir/a}]}}
    - {secret: {name: k}}
    - {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
    - {serviceAccountToken: {path: token, expirationSeconds: 3600}}
`))
	s.ready(t, "p")
	s.want(t, "p", "cat /c/a /k/b /all/dir/a /all/b /all/labels /one; test -s /all/token && echo; echo token", "1111app=\"p\"1\ntoken")
	s.kubectl(t, "patch", "configmap", "c", "--patch", `{"data":{"a":"2","new":"n"}}`)
	s.kubectl(t, "patch", "secret", "k", "--patch", `{"stringData":{"b":"2"}}`)
	s.kubectl(t, "label", "pod", "p", "more=yes")
	s.until(t, "the changes are seen", func() bool {
		return strings.HasPrefix(s.sh(t, "p", "cat /c/a /c/new /k/b /all/dir/a /all/b /all/labels 2>/dev/null || :"), "2n222app=\"p\"\nmore=\"yes\"")
	})
	// A subPath is the file of the start.
	s.want(t, "p", "cat /one", "1")
}

func TestSubPath(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", `
env: [{name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
volumeMounts:
- {name: v, mountPath: /whole}
- {name: v, mountPath: /part, subPath: a/b}
- {name: v, mountPath: /expr, subPathExpr: pods/$(NAME)}
`, "volumes: [{name: v, emptyDir: {}}]"))
	s.ready(t, "p")
	s.sh(t, "p", "echo 1 >/part/f; echo 2 >/expr/g")
	s.want(t, "p", "cd /whole; find . -type f | sort; cat a/b/f pods/p/g", "./a/b/f\n./pods/p/g\n1\n2")
	s.want(t, "p", "ls /part/.. | grep -x b || echo no b", "no b")
}

// An emptyDir on disk is shared by the containers of a pod, and whoever fills one over its limit is evicted, if not told before
// that there is no space.
func TestEmptyDir(t *testing.T) {
	s := newSpace(t)
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {sizeLimit: 8Mi}}]
  containers:
  - {name: one, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /v}]}
  - {name: two, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /w}]}
`, box))
	s.ready(t, "p")
	s.sh(t, "p -c one", "echo shared >/v/f")
	s.want(t, "p -c two", "cat /w/f; mkfifo /w/q; (echo through >/w/q &) ; cat /w/q", "shared\nthrough")
	r := s.try("exec", "p", "-c", "one", "--", "dd", "if=/dev/zero", "of=/v/large", "bs=1M", "count=16")
	if r.code != 0 && strings.Contains(r.stderr, "No space left") {
		return
	}
	// A kubelet looks at what is in a volume every one to two minutes, unless its configuration says otherwise.
	s.within(t, patience()+2*time.Minute, "the pod is evicted", func() bool { return s.pod(t, "p").Status.Reason == "Evicted" })
}

// One in memory has its size, is a tmpfs to those who ask, and is shared too, whole and in part.
func TestEmptyDirMemory(t *testing.T) {
	s := newSpace(t)
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {medium: Memory, sizeLimit: 8Mi}}]
  containers:
  - {name: one, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /v}], resources: {limits: {memory: 64Mi}}}
  - {name: two, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /w}], resources: {limits: {memory: 64Mi}}}
  - {name: three, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /x, subPath: a/b}], resources: {limits: {memory: 64Mi}}}
  - {name: four, image: %[1]s, command: [sleep, infinity], volumeMounts: [{name: v, mountPath: /dev/shm}], resources: {limits: {memory: 64Mi}}}
`, box))
	s.ready(t, "p")
	s.sh(t, "p -c one", "echo shared >/v/f; echo part >/v/a/b/f")
	s.want(t, "p -c two", "cat /w/f; df -k /w | awk 'END { print $2 }'; stat -f -c %T /w", "shared\n8192\ntmpfs")
	s.want(t, "p -c three", "cat /x/f; stat -f -c %T /x", "part\ntmpfs")
	// The usual way to more shared memory than the 64 MiB of a pod.
	s.want(t, "p -c four", "cat /dev/shm/f; df -k /dev/shm | awk 'END { print $2 }'; stat -f -c %T /dev/shm; echo from four >/dev/shm/g", "shared\n8192\ntmpfs")
	s.want(t, "p -c two", "cat /w/g", "from four")
	for container, dir := range map[string]string{"one": "/v", "four": "/dev/shm"} {
		r := s.try("exec", "p", "-c", container, "--", "sh", "-c", "dd if=/dev/zero of="+dir+"/large bs=1M count=16; code=$?; rm "+dir+"/large; exit $code")
		if r.code == 0 || !strings.Contains(r.stderr, "No space left") {
			t.Errorf("16 MiB into 8 at %s: %s", dir, r)
		}
	}
}

// Every type of hostPath does what it says about a path that is there, and about one that is not.
func TestHostPath(t *testing.T) {
	s := newSpace(t)
	dir := s.hostDir(t)
	hostPath := func(name, kind, path string) {
		s.apply(t, sleeper(name, "volumeMounts: [{name: v, mountPath: /v}]",
			fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s/%s, type: %s}}]", dir, path, kind)))
	}
	hostPath("dir-made", "DirectoryOrCreate", "dir")
	s.ready(t, "dir-made")
	s.sh(t, "dir-made", "echo 1 >/v/f; mkfifo /v/fifo")
	hostPath("dir", "Directory", "dir")
	hostPath("file", "File", "dir/f")
	hostPath("file-made", "FileOrCreate", "made")
	hostPath("any", `""`, "dir")
	hostPath("no-dir", "Directory", "missing")
	hostPath("no-file", "File", "dir")
	hostPath("no-socket", "Socket", "dir/f")
	s.ready(t, "dir", "file", "file-made", "any")
	s.want(t, "dir", "cat /v/f", "1")
	s.want(t, "any", "cat /v/f", "1")
	s.want(t, "file", "cat /v; echo 2 >/v", "1")
	s.want(t, "file-made", "echo 3 >/v; cat /v", "3")
	s.want(t, "dir-made", "cat /v/f", "2")
	for _, name := range []string{"no-dir", "no-file", "no-socket"} {
		s.until(t, name+" is refused", func() bool {
			return strings.Contains(s.kubectl(t, "get", "events", "--field-selector", "involvedObject.name="+name), "hostPath type check failed")
		})
		if s.pod(t, name).Status.Phase != corev1.PodPending {
			t.Errorf("%s runs", name)
		}
	}
}

// hostDir is a directory on the node that a pod makes, and another one removes at the test's end.
func (s *space) hostDir(t *testing.T) string {
	t.Helper()
	dir := "/var/tmp/" + envconf.RandomName("microvm-e2e", 20)
	// Before the namespace's end: Cleanup runs the last one first.
	t.Cleanup(func() {
		s.try("delete", "pods", "--all", "--timeout", patience().String())
		clean := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "clean", Namespace: s.name},
			Spec: corev1.PodSpec{
				RestartPolicy: corev1.RestartPolicyNever,
				Containers: []corev1.Container{{
					Name: "main", Image: box, Command: []string{"rm", "-rf", "/v/" + dir[len("/var/tmp/"):]},
					VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/v"}},
				}},
				Volumes: []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/tmp"}}}},
			},
		}
		prepare(&clean.Spec)
		if err := s.Create(context.Background(), clean); err != nil {
			t.Errorf("remove %s from the node: %v", dir, err)
			return
		}
		s.kubectl(t, "wait", "pod", "clean", "--for", "jsonpath={.status.phase}=Succeeded", "--timeout", patience().String())
	})
	return dir
}

// claim makes a persistent volume of the node, and a claim on it that has the same name.
func (s *space) claim(t *testing.T, mode corev1.PersistentVolumeMode, source string) {
	t.Helper()
	name := s.name + "-" + strings.ToLower(string(mode))
	t.Cleanup(func() { s.try("delete", "pv", name, "--wait=false") })
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 100Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  volumeMode: %[2]s
  claimRef: {namespace: %[3]s, name: claim}
  %[4]s
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: claim}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  volumeMode: %[2]s
  resources: {requests: {storage: 100Mi}}
`, name, mode, s.name, source))
}

// A claim's file system outlives the pods that use it.
func TestPersistentVolume(t *testing.T) {
	s := newSpace(t)
	s.claim(t, corev1.PersistentVolumeFilesystem, fmt.Sprintf("hostPath: {path: %s, type: DirectoryOrCreate}", s.hostDir(t)))
	const volumes = "volumes: [{name: v, persistentVolumeClaim: {claimName: claim}}]"
	s.apply(t, script("writer", "echo kept >/v/f; sync", "volumeMounts: [{name: v, mountPath: /v}]", volumes))
	if state := s.ended(t, "writer"); state.ExitCode != 0 {
		t.Fatalf("writer: %v", state)
	}
	s.apply(t, script("reader", "cat /v/f; echo x >/v/f", "volumeMounts: [{name: v, mountPath: /v, readOnly: true}]", volumes))
	if state := s.ended(t, "reader"); state.ExitCode == 0 {
		t.Error("a read-only mount was written to")
	}
	if log := s.logs(t, "reader"); !strings.HasPrefix(log, "kept\n") || !strings.Contains(log, "Read-only file system") {
		t.Errorf("reader: %q", log)
	}
}

// A claim's block device is a disk in the container, and outlives the pods that use it. The node has one to give, in its label
// microvm.io/test-disk.
func TestPersistentBlockVolume(t *testing.T) {
	s := newSpace(t)
	var nodes corev1.NodeList
	if err := s.List(t.Context(), &nodes); err != nil {
		t.Fatal(err)
	}
	var node, disk string
	for _, n := range nodes.Items {
		if d := n.Labels["microvm.io/test-disk"]; d != "" {
			node, disk = n.Name, d
		}
	}
	if disk == "" {
		t.Fatal("no node has the label microvm.io/test-disk, the name of a block device in its /dev that the tests may write to")
	}
	s.claim(t, corev1.PersistentVolumeBlock, fmt.Sprintf(
		"local: {path: /dev/%s}\n  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}]}}", disk, node))
	const volumes = "volumes: [{name: v, persistentVolumeClaim: {claimName: claim}}]"
	for i, text := range []string{
		"test -b /dev/xd && echo kept | dd of=/dev/xd bs=4096 seek=5 conv=fsync 2>/dev/null",
		"dd if=/dev/xd bs=4096 skip=5 count=1 2>/dev/null | head -n 1 | grep -x kept && blockdev --getsize64 /dev/xd",
	} {
		name := fmt.Sprintf("p%d", i)
		s.apply(t, script(name, text, "volumeDevices: [{name: v, devicePath: /dev/xd}]", volumes))
		if state := s.ended(t, name); state.ExitCode != 0 {
			t.Errorf("%s: %v: %s", name, state, s.logs(t, name))
		}
		s.kubectl(t, "delete", "pod", name, "--timeout", patience().String())
	}
}

// Large and many files, and links, in a volume that two containers share.
func TestVolumeFiles(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "volumeMounts: [{name: v, mountPath: /v}]", "volumes: [{name: v, emptyDir: {}}]"))
	s.ready(t, "p")
	s.want(t, "p", `cd /v; for i in $(seq 1000); do echo $i >f$i; done; ls | wc -l; cat f* | sort -n | tail -n 1
		head -c 5000000 /dev/zero >large; ln -s large link; ln large hard; stat -Lc '%s %h' link; rm large; stat -c %h hard`, "1000\n1000\n5000000 2\n1")
}
