module ztmtls.dev/eksctl

go 1.26.0

require github.com/weaveworks/eksctl v0.215.0
