package main

// An image is made of layers that hack/images/build.sh has made.
type image struct {
	names               []string // repository:tag; more than one are tags of the same image
	layers              []string
	entrypoint, command []string
	user                string
}

var (
	shell = []string{"sh"}
	nginx = []string{"nginx", "-g", "daemon off;"}
	httpd = []string{"sh", "-c", "echo httpd started; exec httpd -f -p 80 -h /www"}

	busyboxLayer = []string{"busybox"}
	nginxLayers  = []string{"busybox", "nginx"}
)

// catalogs are the images that a suite asks for, without the registry's name.
var catalogs = map[string][]image{"critest": critest, "conformance": conformance}

const (
	suite = "e2e-test-images/"
	tools = "k8s-staging-cri-tools/"
)

// critest v1.36 asks for these: the constants of its pkg/framework and pkg/validate.
var critest = []image{
	{names: []string{suite + "busybox:1.29-2"}, layers: busyboxLayer, command: shell},
	{names: []string{suite + "nginx:1.14-2"}, layers: nginxLayers, command: nginx},
	{names: []string{suite + "httpd:2.4.39-4"}, layers: busyboxLayer, command: httpd},
	{names: []string{suite + "nonewprivs:1.3"}, layers: []string{"nonewprivs"}, entrypoint: []string{"/nonewprivs"}},
	{names: []string{"pause:3.9"}, layers: []string{"pause"}, entrypoint: []string{"/pause"}},
	{names: []string{tools + "hostnet-nginx-amd64:latest"}, layers: append(nginxLayers[:2:2], "nginx-hostnet"), command: nginx},
	{names: []string{tools + "test-image-latest:latest"}, layers: busyboxLayer, command: shell},
	{names: []string{tools + "test-image-1:latest"}, layers: busyboxLayer, command: shell},
	{names: []string{tools + "test-image-2:latest"}, layers: busyboxLayer, command: shell},
	{names: []string{tools + "test-image-3:latest"}, layers: busyboxLayer, command: shell},
	{names: []string{tools + "test-image-tag:test"}, layers: busyboxLayer, command: shell},
	{names: []string{tools + "test-image-tag:all"}, layers: busyboxLayer, command: shell},
	{
		names:  []string{tools + "test-image-tags:1", tools + "test-image-tags:2", tools + "test-image-tags:3"},
		layers: busyboxLayer, command: shell,
	},
	{names: []string{tools + "test-image-user-uid:latest"}, layers: busyboxLayer, command: shell, user: "1002"},
	{names: []string{tools + "test-image-user-username:latest"}, layers: busyboxLayer, command: shell, user: "www-data"},
	{names: []string{tools + "test-image-user-uid-group:latest"}, layers: busyboxLayer, command: shell, user: "1003:1000"},
	{names: []string{tools + "test-image-user-username-group:latest"}, layers: busyboxLayer, command: shell, user: "www-data:www-data"},
	{names: []string{tools + "test-image-predefined-group:latest"}, layers: []string{"busybox", "groups"}, command: shell, user: "1000"},
}

// conformance is what the [NodeConformance] tests of Kubernetes v1.36 ask for: test/utils/image has the names.
var conformance = []image{
	{names: []string{suite + "agnhost:2.63.0"}, layers: []string{"busybox", "agnhost"}, entrypoint: []string{"/agnhost"}, command: []string{"pause"}},
	{names: []string{suite + "busybox:1.37.0-1"}, layers: busyboxLayer, command: shell},
	{names: []string{suite + "nginx:1.15-4", suite + "nginx:1.27-0"}, layers: nginxLayers, command: nginx},
	{names: []string{suite + "nonewprivs:1.4"}, layers: []string{"nonewprivs"}, entrypoint: []string{"/nonewprivs"}},
	{names: []string{suite + "nonroot:1.5"}, layers: busyboxLayer, command: []string{"sh", "-c", "id -u"}, user: "1234"},
	{names: []string{"pause:3.10.2"}, layers: []string{"pause"}, entrypoint: []string{"/pause"}},
}
